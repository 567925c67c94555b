"""An SD 1.5-sized checkpoint with random weights, and a MoA made from it, sampled through ComfyUI's nodes.

As a script in a process of its own, so that its peak memory is its own: real_size.py make|sample FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4], "num_heads": 8, "use_spatial_transformer": True, "context_dim": 768, "legacy": False,
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
}  # fmt: skip
VAE = {
    "double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
    "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0,
}  # fmt: skip


def random_weight(name: str, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A weight that keeps activations at their scale: normal by fan-in, norms about 1, biases about 0."""
    scale = like.shape[1:].numel() ** -0.5 if like.ndim > 1 else 0.02
    is_norm = like.ndim == 1 and name.endswith("weight")
    return torch.randn(like.shape, generator=generator) * scale + float(is_norm)


def random_weights(shapes: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: random_weight(name, like, generator) for name, like in shapes.items()}


def make(folder: Path) -> dict:
    """The checkpoint under the host's own key names, fp16, and the MoA file."""
    from comfy_host import start_host

    host = start_host(folder)
    import comfy.sd1_clip
    from comfy.ldm.models.autoencoder import AutoencoderKL
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from safetensors.torch import save_file

    parts = {
        "model.diffusion_model.": UNetModel(**UNET, device="meta"),
        "cond_stage_model.": comfy.sd1_clip.SDClipModel(device="meta", dtype=torch.float16),
    }
    with torch.device("meta"):
        parts["first_stage_model."] = AutoencoderKL(ddconfig=VAE, embed_dim=4)
    weights = {
        prefix + name: weight.half()
        for prefix, module in parts.items()
        for name, weight in random_weights(module.state_dict()).items()
    }
    save_file(weights, folder / "models/checkpoints/sd15-random.safetensors")

    moa_module, moa_file = host.module("moa_core.learned.moa"), host.module("moa_core.learned.moa_file")
    prior = {name: weight for name, weight in weights.items() if name.startswith("model.diffusion_model.")}
    moa = moa_module.MoA.from_prior(prior)
    from conftest import stir

    moa_file.save_moa(stir(moa), folder / "models/moa/moa-sd15-random.safetensors", torch.float16)
    attention = [w.numel() for name, w in moa.mixture.named_parameters() if name.startswith("layers.")]
    return {
        "checkpoint_gb": (folder / "models/checkpoints/sd15-random.safetensors").stat().st_size / 1e9,
        "layers": len(moa.mixture.layers),
        "experts_and_routers_mb": 2 * sum(attention) / 1e6,
    }


def sample(folder: Path) -> dict:
    """Prior, strength 0 and MoA: two steps at 128x128 each."""
    from comfy_host import start_host

    host = start_host(folder)
    with torch.inference_mode():
        model, clip, vae = host.run("CheckpointLoaderSimple", "sd15-random.safetensors")
        moa = host.run("MoALoader", "moa-sd15-random.safetensors")[0]
        subject = host.subject(moa)
        out = {}
        for name, strength in (("prior", None), ("zero", 0.0), ("moa", 1.0)):
            patched, bound_clip = (
                (model, clip) if strength is None else host.patch(model, clip, moa, subject, strength=strength)
            )
            positive, negative = host.prompt(bound_clip, "a man in paris"), host.prompt(bound_clip, "bad")
            out[name] = host.sample(patched, positive, negative, steps=2, sampler="uni_pc")["samples"]
        picture = host.run("VAEDecode", vae, {"samples": out["moa"]})[0]
        peak = peak_gib()
        trained_on = read_for_training(folder, model, clip, vae)
    return {
        "peak_gib": peak,
        "training_differs": trained_on,
        "family": type(model.model.model_config).__name__,
        "strength_0_bit_exact": torch.equal(out["prior"], out["zero"]),
        "moa_changes": (out["moa"] - out["prior"]).abs().max().item(),
        "picture": list(picture.shape),
        "finite": bool(out["moa"].isfinite().all()),
    }


def peak_gib() -> float:
    """Of this process so far; getrusage would count what the process that started it had taken."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def read_for_training(folder: Path, model, clip, vae) -> float:
    """The largest difference, over the outputs' own size, between the host's U-Net, text encoder and autoencoder and
    those that a training reads from the same file.
    """
    from training.host.pretrained import load_base
    from training.host.tokenizer import tokenize

    base = load_base(folder / "models/checkpoints/sd15-random.safetensors")
    unet = model.model.diffusion_model.cpu().float()
    latents, timestep, context = torch.randn(1, 4, 16, 16), torch.tensor([500.0]), torch.randn(1, 77, 768)
    text = clip.encode_from_tokens(clip.tokenize("a man in paris"))
    autoencoder = vae.first_stage_model.cpu().float()
    pairs = (
        (unet(latents, timestep, context=context), base.unet(latents, timestep, context).sample),
        (text.cpu(), base.text_encoder(torch.tensor([tokenize("a man in paris")])).last_hidden_state),
        (autoencoder.decode(latents), base.autoencoder.vae.decode(latents).sample),
    )
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def main(*steps: Callable[[Path], dict]) -> None:
    here = Path(__file__).resolve()
    sys.path[:0] = [str(here.parents[2]), str(here.parents[1]), str(here.parent)]
    figures = {step.__name__: step for step in steps}[sys.argv[1]](Path(sys.argv[2]))
    print(json.dumps({"peak_gib": peak_gib()} | figures))


if __name__ == "__main__":
    main(make, sample)
