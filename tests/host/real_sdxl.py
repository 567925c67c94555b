"""SDXL, and the adapters that people have for it, at their size, with random weights, through ComfyUI's nodes.

As a script in processes of their own, so that their peak memory is their own:
real_sdxl.py make|sample|make_faces|sample_faces FOLDER
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from real_size import VAE, main, random_weight
from torch import Tensor

CHECKPOINT, ADAPTER, VISION = "sdxl.safetensors", "ip-adapter-plus_sdxl_vit-h.safetensors", "vit-h.safetensors"
FACEID, PHOTOMAKER = "ip-adapter-faceid-plusv2_sdxl.bin", "photomaker-v1.bin"


def write(path: Path, shapes: Mapping[str, Tensor]) -> float:
    """A .safetensors file of random weights in fp16, one at a time as it would not fit into memory twice; its GB."""
    header, end = {}, 0
    for name, like in shapes.items():
        begin, end = end, end + 2 * like.numel()
        header[name] = {"dtype": "F16", "shape": list(like.shape), "data_offsets": [begin, end]}
    text, generator = json.dumps(header).encode(), torch.Generator().manual_seed(0)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, like in shapes.items():
            file.write(random_weight(name, like, generator).half().numpy().tobytes())
    return path.stat().st_size / 1e9


def make(folder: Path) -> dict:
    """The three files, their weights named as in the published ones."""
    from comfy_host import start_host

    start_host(folder)
    import comfy.clip_model
    import comfy.ops
    import comfy.sdxl_clip
    import comfy.supported_models
    from comfy.ldm.models.autoencoder import AutoencoderKL
    from ip_adapter_files import random_file
    from safetensors.torch import save_file
    from sdxl import sdxl_unet

    from moa_core.adapters.image_expert import file_order
    from moa_core.address import block_shapes
    from training.host.ldm_names import unet_to_ldm

    with torch.device("meta"):
        unet, vae = sdxl_unet().state_dict(), AutoencoderKL(ddconfig=VAE, embed_dim=4).state_dict()
    towers = comfy.sdxl_clip.SDXLClipModel(device="meta", dtype=torch.float16).state_dict()
    checkpoint = {f"model.diffusion_model.{name}": like for name, like in unet_to_ldm(unet, 2).items()}
    checkpoint |= comfy.supported_models.SDXL({}).process_clip_state_dict_for_saving(towers)
    checkpoint |= {f"first_stage_model.{name}": like for name, like in vae.items()}
    config = Path(comfy.clip_model.__file__).with_name("clip_vision_config_h.json")
    vision = comfy.clip_model.CLIPVisionModelProjection(
        json.loads(config.read_text()), torch.float16, "meta", comfy.ops.manual_cast
    )
    blocks, models = block_shapes(unet), folder / "models"
    adapter = random_file("plus", [blocks[a] for a in file_order(blocks)], 2048, width=1280, hidden=1280)
    for kind in ("ipadapter", "clip_vision"):
        (models / kind).mkdir(exist_ok=True)
    save_file({name: weight.half() for name, weight in adapter.items()}, models / "ipadapter" / ADAPTER)
    return {
        "checkpoint_gb": write(models / "checkpoints" / CHECKPOINT, checkpoint),
        "vision_gb": write(models / "clip_vision" / VISION, vision.state_dict()),
        "adapter_gb": (models / "ipadapter" / ADAPTER).stat().st_size / 1e9,
        "layers": len(blocks),
    }


def sample(folder: Path) -> dict:
    """Prior, strength 0, two people from photos and two from LoRAs, two steps at 256x256 each; weights stay in fp16."""
    from comfy_host import start_host

    host = start_host(folder)
    from comfy.cli_args import args
    from lora_files import random_lora
    from safetensors.torch import save_file

    args.fp16_unet = True
    prompt = "a man and a woman in paris"
    pictures = torch.rand(2, 1, 300, 240, 3, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model, clip, _ = host.run("CheckpointLoaderSimple", CHECKPOINT)
        vision = host.run("CLIPVisionLoader", VISION)[0]
        moa = host.run("MoAFromIPAdapter", ADAPTER, vision)[0]
        people = [
            host.run("MoASubjectEncoder", moa, picture, word)[0]
            for picture, word in zip(pictures, ("man", "woman"), strict=True)
        ]
        out = {}
        for name, strength in (("prior", None), ("zero", 0.0), ("moa", 1.0)):
            patched, bound_clip = (
                (model, clip) if strength is None else host.patch(model, clip, moa, *people, strength=strength)
            )
            positive, negative = host.prompt(bound_clip, prompt), host.prompt(bound_clip, "bad")
            out[name] = host.sample(patched, positive, negative, steps=2, size=32)["samples"]
        masks = host.run("MoARouterVisualizer", patched, {"samples": out["moa"]})[2]
        loras = []
        for seed, word in enumerate(("man", "woman")):
            weights = random_lora(model, clip, seed, only=r"attn|\.ff\.|proj_", rank=16, scale=0.05)
            save_file(
                {name: weight.half() for name, weight in weights.items()}, folder / f"models/loras/{word}.safetensors"
            )
            loras.append(host.run("MoALoRASubject", f"{word}.safetensors", word, "sks")[0])
        patched, bound_clip = host.patch(model, clip, None, *loras)
        positive, negative = host.prompt(bound_clip, prompt), host.prompt(bound_clip, "bad")
        out["loras"] = host.sample(patched, positive, negative, steps=2, size=32)["samples"]
        deltas = patched.get_attachment("moa").adapters.deltas
    return {
        "family": type(model.model.model_config).__name__,
        "base": moa.base,
        "tokens": list(moa.adapter.mixture.negative.shape),
        "strength_0_bit_exact": torch.equal(out["prior"], out["zero"]),
        "moa_changes": (out["moa"] - out["prior"]).abs().max().item(),
        "masks": list(masks.shape),
        "changed_layers": len(deltas.layers),
        "loras_change": (out["loras"] - out["prior"]).abs().max().item(),
        "loras_gb": sum(weight.nbytes for weight in deltas.parameters()) / 1e9,
        "finite": all(bool(each.isfinite().all()) for each in out.values()),
    }


def make_faces(folder: Path) -> dict:
    """A FaceID-plusv2 file with its LoRA of rank 128 and a PhotoMaker file with its LoRA of rank 64, in fp16."""
    from comfy_host import start_host

    host = start_host(folder)
    from ip_adapter_files import random_file
    from photomaker_files import random_photomaker
    from sdxl import sdxl_unet

    from moa_core.adapters.image_expert import file_order
    from moa_core.address import block_shapes

    with torch.device("meta"):
        unet = sdxl_unet()
    blocks, files = block_shapes(unet.state_dict()), {}
    shapes = [blocks[address] for address in file_order(blocks)]
    faceid = {"image_proj": {}, "ip_adapter": {}}
    for full, weight in random_file("faceid-plusv2", shapes, 2048, width=1280, rank=128).items():
        part, name = full.split(".", 1)
        faceid[part][name] = (0.2 * weight if "lora" in name else weight).half()
    files["ipadapter", FACEID] = faceid
    photomaker = random_photomaker(host, unet, rank=64)
    photomaker["lora_weights"] = {name: 0.2 * weight for name, weight in photomaker["lora_weights"].items()}
    files["photomaker", PHOTOMAKER] = {
        part: {name: weight.half() for name, weight in weights.items()} for part, weights in photomaker.items()
    }
    for (kind, name), parts in files.items():
        (folder / "models" / kind).mkdir(exist_ok=True)
        torch.save(parts, folder / "models" / kind / name)
    sizes = ((folder / "models" / kind / name).stat().st_size / 1e9 for kind, name in files)
    return dict(zip(("faceid_gb", "photomaker_gb"), sizes, strict=True))


def sample_faces(folder: Path) -> dict:
    """The checkpoint alone, and with a man by his face and a woman by two photos, two steps at 256x256 each."""
    from comfy_host import start_host

    host = start_host(folder)
    from comfy.cli_args import args
    from face_pictures import FaceFinder, photo

    args.fp16_unet = True
    prompt = "a man and a woman in paris"
    pictures = torch.rand(2, 300, 240, 3, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model, clip, _ = host.run("CheckpointLoaderSimple", CHECKPOINT)
        faceid = host.run("MoAFromIPAdapter", FACEID, host.run("CLIPVisionLoader", VISION)[0], FaceFinder())[0]
        maker = host.run("MoAFromPhotoMaker", PHOTOMAKER)[0]
        man = host.run("MoASubjectEncoder", faceid, photo((40, 20, 30, 40)), "man")[0]
        woman = host.run("MoASubjectEncoder", maker, pictures, "woman")[0]
        out = {}
        for name, people in (("prior", ()), ("both", (man, woman)), ("woman", (woman,))):
            patched, bound_clip = host.patch(model, clip, None, *people) if people else (model, clip)
            positive, negative = host.prompt(bound_clip, prompt), host.prompt(bound_clip, "bad")
            out[name] = host.sample(patched, positive, negative, steps=2, size=32)["samples"]
    return {
        "both_change": (out["both"] - out["prior"]).abs().max().item(),
        "man_changes": (out["both"] - out["woman"]).abs().max().item(),
        "woman_changes": (out["woman"] - out["prior"]).abs().max().item(),
        "finite": all(bool(each.isfinite().all()) for each in out.values()),
    }


if __name__ == "__main__":
    main(make, sample, make_faces, sample_faces)
