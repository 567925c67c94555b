"""What MoA costs in ComfyUI: step time and peak memory beside the base model's, and the cost of the trace.

`make bench`, or: python -m tests.bench [--shapes toy sd15] [--areas 0.25] [--rounds 3]. One step is one U-Net
call of two rows (positive and negative) through ComfyUI's own sampling, on the GPU when there is one. All
variants of a shape are timed in turn, round after round, and the medians compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "host"), str(HERE)]

from comfy_host import start_host  # noqa: E402
from real_size import UNET, random_weights  # noqa: E402

from training.comfyui import make_base_directory  # noqa: E402

TOY = UNET | {
    "model_channels": 64, "num_res_blocks": [1, 1], "channel_mult": [1, 2], "num_heads": 2, "context_dim": 64,
    "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1],
}  # fmt: skip
FEATURES = 64
SHAPES = {"toy": (TOY, 128), "sd15": (UNET, 512)}
"""U-Net configuration, and the side of its pictures in pixels."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--areas", type=float, nargs="+", default=[0.10, 0.25, 0.50], help="subject area, 0 to 1")
    options = parser.parse_args()
    host = start_host(make_base_directory(Path(tempfile.mkdtemp())), cpu=not torch.cuda.is_available())
    with torch.inference_mode():
        for shape in options.shapes:
            bench(host, shape, options.areas, options.rounds)


def bench(host, shape: str, areas: list[float], rounds: int) -> None:
    config, pixels = SHAPES[shape]
    model, moa = make_models(host, config)
    variants = {"prior": model}
    for area in areas:
        for sparse in (False, True):
            variants[f"{'sparse' if sparse else 'dense'} {area:.0%}"] = patched(host, model, moa, area, sparse)
    step = {name: one_step(host, variant, config["context_dim"], pixels // 8) for name, variant in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    memory: dict[str, float] = {}
    recording: list[float] = []
    for round in range(rounds + 1):  # the first round warms up, and measures memory
        for name in variants:
            if round == 0:
                memory[name] = peak_memory(step[name])
                continue
            with recording_time(host) as spent:
                start = time.perf_counter()
                step[name]()
                synchronize()
                times[name].append(time.perf_counter() - start)
            print(f"{shape} round {round}: {name} {times[name][-1]:.2f} s", file=sys.stderr)
            if name != "prior":
                recording.append(spent[0] / times[name][-1])
    prior = statistics.median(times["prior"])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{shape}, {pixels}x{pixels}, 2 rows, {device}, median of {rounds}")
    print(f"{'':14}{'s/step':>10}{'ratio':>8}{'peak MiB':>10}")
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"{name:14}{median:10.4f}{median / prior:8.2f}{memory[name]:10.0f}")
    print(f"recording the trace: {statistics.median(recording):.2%} of a step")


def make_models(host, config: dict):
    """A base model with random weights, and a MoA of its shape in its ModelPatcher."""
    import comfy.model_management as mm
    import comfy.ops
    import comfy.sd
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.model_patcher import CoreModelPatcher

    moa_module = host.module("moa_core.moa")
    names = UNetModel(**config, device="meta").state_dict()
    weights = {f"model.diffusion_model.{name}": weight for name, weight in random_weights(names).items()}
    encoder = {"image_size": 32, "patch_size": 16, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1,
               "intermediate_size": 64, "projection_dim": FEATURES}  # fmt: skip
    moa_config = moa_module.MoAConfig.for_unet(weights, heads=config["num_heads"], image_encoder=encoder)
    device = mm.get_torch_device()
    dtype = mm.unet_dtype(device)
    fresh = moa_module.MoA.from_prior(weights, moa_config).to(dtype)
    mixture = moa_module.Mixture(moa_config, comfy.ops.manual_cast, dtype=dtype)
    mixture.load_state_dict(fresh.mixture.state_dict())
    model = comfy.sd.load_diffusion_model_state_dict(weights)
    return model, CoreModelPatcher(mixture, load_device=device, offload_device=mm.unet_offload_device())


def patched(host, model, mixture, area: float, sparse: bool):
    """The model with a MoA whose routers choose that part of every layer, after doing all their work."""
    hooks = host.module("nodes.model_hooks")

    class AreaHooks(hooks.MoAHooks):
        def call_unet(self, *args, **kwargs):
            for layer in self.mixture.layers.values():
                layer.router.area = area
            return super().call_unet(*args, **kwargs)

    for layer in mixture.model.layers.values():
        layer.router.forward = lambda h, router=layer.router: choose(type(router).forward(router, h), router.area)
    clone = model.clone()
    AreaHooks(mixture.model, [], 1.0, 0.0, 1.0, sparse).attach(clone, mixture)
    return clone


def choose(share: torch.Tensor, area: float) -> torch.Tensor:
    """R [B, N, 2]: 0.9 for the expert in the middle part of the pixels, 0.001 elsewhere."""
    pixels = share.shape[1]
    chosen, start = round(area * pixels), round((1 - area) / 2 * pixels)
    share[..., 1] = 0.001
    share[:, start : start + chosen, 1] = 0.9
    return share


def bound_prompt(host):
    """What a MoA's CLIP would note of a prompt that holds a subject's word: without one MoA does not act."""
    binding, notes = host.module("moa_core.binding"), host.module("nodes.clip_binding")
    subject = host.module("moa_core.subject").Subject(torch.randn(1, FEATURES), "man", "man")
    return {notes.BOUND_PROMPT: binding.BoundPrompt("man", (binding.Binding(1, subject),))}


def one_step(host, model, text_dim: int, side: int):
    """A function that runs one step at guidance scale 7: positive and negative in one U-Net call."""
    import comfy.sample
    import comfy.samplers

    positive, negative = ([[torch.randn(1, 77, text_dim), note]] for note in (bound_prompt(host), {}))
    latent = torch.zeros(1, 4, side, side)
    noise = comfy.sample.prepare_noise(latent, 0)
    sigmas = model.get_model_object("model_sampling").sigmas[[500, 0]]

    def step():
        comfy.samplers.sample(
            model, noise, positive, negative, 7.0, model.load_device, comfy.samplers.sampler_object("euler"), sigmas,
            latent_image=latent, disable_pbar=True,
        )  # fmt: skip

    return step


class recording_time:
    """Seconds spent recording the trace within the block: [seconds]."""

    def __init__(self, host):
        self.hooks = host.module("nodes.model_hooks").MoAHooks

    def __enter__(self) -> list[float]:
        spent, record = [0.0], self.hooks._record
        self.record = record

        def timed(*args):
            synchronize()
            start = time.perf_counter()
            record(*args)
            synchronize()
            spent[0] += time.perf_counter() - start

        self.hooks._record = staticmethod(timed)
        return spent

    def __exit__(self, *_) -> None:
        self.hooks._record = staticmethod(self.record)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory(step) -> float:
    """MiB that a step takes at its height, above what was there before (on a GPU: all that is allocated)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / 2**20
    import psutil

    process, peak, done = psutil.Process(), [0], threading.Event()
    step()  # what the first step allocates for good is not the step's
    before = process.memory_info().rss

    def watch():
        while not done.wait(0.002):
            peak[0] = max(peak[0], process.memory_info().rss - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    step()
    done.set()
    watcher.join()
    return peak[0] / 2**20


if __name__ == "__main__":
    main()
