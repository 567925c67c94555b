"""What MoA costs in ComfyUI: step time and peak memory beside the base model's, and the cost of the trace.

`make bench`, or: python -m tests.bench [--shapes toy sd15] [--areas 0.25] [--rounds 3]. One step is one U-Net call of
two rows (positive and negative) through ComfyUI's own sampling, on the GPU when there is one. A run has three steps, of
which the last is timed: sparse routing cuts nothing at first, and image experts make in the second what they keep.
Weights are random, but routers say what those of the shipped toy MoA say where its subjects are and elsewhere. Beside
it, on the same U-Net in diffusers, IP-Adapter's attention for one picture. All variants of a shape are timed in turn,
round after round, and the medians compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "host"), str(HERE)]

from comfy_host import start_host  # noqa: E402
from lora_files import random_lora  # noqa: E402
from real_size import UNET, random_weights  # noqa: E402
from trained_shares import Kind, TrainedShares, square  # noqa: E402

from training.comfyui import make_base_directory  # noqa: E402
from training.host import sd15, toy_base  # noqa: E402

TOY = UNET | {
    "model_channels": 64, "num_res_blocks": [1, 1], "channel_mult": [1, 2], "num_heads": 2, "context_dim": 64,
    "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1],
}  # fmt: skip
SHAPES = {"toy": (TOY, 192, lambda: toy_base.random_toy().unet), "sd15": (UNET, 512, sd15.unet)}
"""U-Net configuration, the side of its pictures in pixels, and the same U-Net in diffusers."""
VITAL = {"toy": range(1, 3), "sd15": range(4, 11)}
"""Of the decoder's blocks those that hold an expert in self-attention, too; in cross-attention all of them do. The
shipped toy MoA's, and half of SD 1.5's layers in the same places."""
IMAGE_TOKENS = 4
LORA_RANK, LORA_LAYERS = 32, r"attn|\.ff\.|proj_"
"""Of a character LoRA: attention, feed-forward and projections, as kohya's trainer does unless told otherwise."""
BEFORE = 1
"""Number of the step before the one that is timed."""


@dataclass
class Step:
    seconds: float
    memory: float = 0.0
    """MiB at its height, above what was there before (on a GPU: all that is allocated)."""
    asked: float | None = None
    """Part of all layers' pixels that went through the expert."""
    recording: float = 0.0
    """Seconds of it spent on recording the trace."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--areas", type=float, nargs="+", default=[0.10, 0.25, 0.50], help="subject area, 0 to 1")
    parser.add_argument(
        "--use-pytorch-cross-attention", action="store_true", help="ComfyUI's flag: on a CPU its default is slower"
    )
    parser.add_argument(
        "--rows", nargs="+", default=[""], help="parts of the names of the rows to time beside the prior"
    )
    options = parser.parse_args()
    flags = ["--use-pytorch-cross-attention"] * options.use_pytorch_cross_attention
    flags += ["--cpu"] * (not torch.cuda.is_available())
    host = start_host(make_base_directory(Path(tempfile.mkdtemp())), flags)
    shares = TrainedShares.of_shipped()
    print(shares)
    with torch.inference_mode():
        for shape in options.shapes:
            bench(host, shape, options.areas, options.rounds, shares, options.rows)


def bench(host, shape: str, areas: list[float], rounds: int, shares: TrainedShares, rows: list[str]) -> None:
    import comfy.sd

    config, pixels, peer = SHAPES[shape]
    model, whole, mixture = make_models(host, config, VITAL[shape])
    models = {"prior": model, "dense": patched(host, model, mixture, areas[0], False, shares)}
    models |= {f"sparse {area:.0%}": patched(host, model, mixture, area, True, shares) for area in areas}
    models |= {"all layers, dense": patched(host, model, whole, areas[0], False, shares)}
    models |= {f"all layers, {area:.0%}": patched(host, model, whole, area, True, shares) for area in areas}
    adapter = image_experts(host, model)
    models |= {f"image experts {area:.0%}": with_image_experts(host, model, adapter, area) for area in [*areas, 1.0]}
    files = [random_lora(model, seed=seed, only=LORA_LAYERS, rank=LORA_RANK) for seed in range(2)]
    models |= {f"{n} LoRA subject{'s' * (n > 1)}": with_lora_subjects(host, model, files[:n]) for n in (1, 2)}
    models |= {f"Load LoRA, {n}": with_loras(model, files[:n], comfy.sd.load_lora_for_models) for n in (1, 2)}
    if hasattr(comfy.sd, "load_bypass_lora_for_models"):
        models["bypass, 2"] = with_loras(model, files, comfy.sd.load_bypass_lora_for_models)
    steps = {name: comfyui_step(host, one, config["context_dim"], pixels // 8) for name, one in models.items()}
    steps["masked hooks, 2"] = comfyui_step(host, model, config["context_dim"], pixels // 8, files)
    device, dtype = model.load_device, model.model_dtype()
    peers = peer_steps(peer().eval().to(device, dtype), config["context_dim"], pixels // 8)
    wanted = {name for name in steps | peers if any(row in name for row in rows)} | {"prior"}
    wanted |= {"diffusers"} if wanted & peers.keys() else set()
    steps = {name: step for name, step in (steps | peers).items() if name in wanted}
    taken: dict[str, list[Step]] = {name: [] for name in steps}
    for round in range(rounds + 1):  # the first round warms up
        for name, step in steps.items():
            taken[name].append(step())
            print(f"{shape} round {round}: {name} {taken[name][-1].seconds:.2f} s", file=sys.stderr)

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"\n{shape}, {pixels}x{pixels}, 2 rows, {name}, {dtype}, median of {rounds}")
    print(f"{'':20}{'s/step':>10}{'ratio':>8}{'peak MiB':>10}{'asked':>8}")
    medians = {name: statistics.median(step.seconds for step in each[1:]) for name, each in taken.items()}
    for name, seconds in medians.items():
        ratio, last = seconds / medians["diffusers" if name in peers else "prior"], taken[name][-1]
        asked = "" if last.asked is None else f"{last.asked:.0%}"
        print(f"{name:20}{seconds:10.4f}{ratio:8.2f}{last.memory:10.0f}{asked:>8}")
    recording = [step.recording / step.seconds for name in steps for step in taken[name][1:] if step.recording]
    if recording:
        print(f"recording the trace: {statistics.median(recording):.2%} of a step")


def make_models(host, config: dict, vital: range):
    """A base model with random weights, and two MoAs of its shape in their ModelPatchers, the second one's experts in
    the decoder's cross-attention and in the self-attention of these of its blocks.
    """
    import comfy.model_management as mm
    import comfy.ops
    import comfy.sd
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.model_patcher import CoreModelPatcher

    moa_module = host.module("moa_core.learned.moa")
    names = UNetModel(**config, device="meta").state_dict()
    weights = {f"model.diffusion_model.{name}": weight for name, weight in random_weights(names).items()}
    encoder = {"image_size": 32, "patch_size": 16, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1,
               "intermediate_size": 64, "projection_dim": 64}  # fmt: skip
    moa_config = moa_module.MoAConfig.for_unet(weights, heads=config["num_heads"], image_encoder=encoder)
    device = mm.get_torch_device()
    dtype = mm.unet_dtype(device)
    fresh = moa_module.MoA.from_prior(weights, moa_config)
    layers = [
        (address, attention)
        for address, attention in moa_config.layers
        if address.kind == "output" and (attention == "attn2" or address.block in vital)
    ]
    join = host.module("moa_core.learned.joined_layer").joined
    moas = (fresh, fresh.with_experts_in(layers))
    mixtures = [join(moa.mixture, comfy.ops.disable_weight_init, dtype=dtype) for moa in moas]
    offload = mm.unet_offload_device()
    model = comfy.sd.load_diffusion_model_state_dict(weights)
    return model, *(CoreModelPatcher(mixture, load_device=device, offload_device=offload) for mixture in mixtures)


def patched(host, model, mixture, area: float, sparse: bool, shares: TrainedShares):
    """The model with a MoA whose routers, after all their work, tell of subjects on that part of the picture."""
    hooks, learned = host.module("nodes.sampling.sampling_run"), mixture.model
    routed = host.module("moa_core.routing.subject_area").routed_blocks(list(learned.config.blocks))

    class AreaHooks(hooks.MoAHooks):
        def sample(self, *args, **kwargs):
            for number, (address, attention) in enumerate(learned.config.layers):
                layer, kind = learned.layer(address, attention), (address in routed, attention)
                layer.project = telling(layer, shares, kind, area, number)
            return super().sample(*args, **kwargs)

    subject = host.module("moa_core.subjects.subject").Subject(torch.zeros(1, 64), "man", "man")
    clone = model.clone()
    AreaHooks([subject], sparse=sparse, learned=learned).attach(clone, mixture)
    return clone


def image_experts(host, model):
    """Those of an IP-Adapter for one picture, with random weights, in their ModelPatcher."""
    import comfy.model_management as mm
    import comfy.ops
    from comfy.model_patcher import CoreModelPatcher

    images = host.module("moa_core.adapters.image_expert")
    blocks = host.module("nodes.host.attention_layers").unet_blocks(model)
    shapes = [blocks[address] for address in images.file_order(blocks)]
    mixture = images.ImageMixture(shapes, IMAGE_TOKENS, comfy.ops.manual_cast, dtype=model.model_dtype())
    mixture.load_state_dict(random_weights(mixture.state_dict()))
    return CoreModelPatcher(mixture, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device())


def with_image_experts(host, model, adapter, area: float):
    """The model with image experts; the words' places are read, and then told to be that part of the picture."""
    subject = host.module("moa_core.subjects.subject").Subject(torch.randn(1, adapter.model.feature_dim), "man", "man")
    adapters = host.module("moa_core.adapters.run").Adapters({subject: adapter.model}, {})
    clone = model.clone()
    told(host, [subject], adapters, lambda side: square(side, area)[None]).attach(clone, adapter)
    return clone


def with_lora_subjects(host, model, files: list[dict]):
    """The model with LoRA subjects, a quarter of the picture each."""
    loras, adapters = host.module("nodes.experts.lora_file"), host.module("nodes.experts.adapters")
    subject_class = host.module("moa_core.subjects.subject").Subject
    subjects = [
        subject_class(torch.ones(1, 1), "man", "man", adapter=loras.LoRAs((loras.LoRAFile(f"{n}", file),)))
        for n, file in enumerate(files)
    ]
    beside, patchers, _ = adapters.adapters_of(model, None, subjects)
    clone = model.clone()
    told(host, subjects, beside, lambda side: quarters(side)[: len(subjects)]).attach(clone, *patchers)
    return clone


def quarters(side: int) -> torch.Tensor:
    """[2, side, side]: the picture's upper left and lower right."""
    there, half = torch.zeros(2, side, side), side // 2
    there[0, :half, :half], there[1, half:, half:] = 1.0, 1.0
    return there


def with_loras(model, files: list[dict], load: Callable):
    """The model with LoRAs in all of the picture, by one of the host's own loaders."""
    for file in files:
        model = load(model, None, file, 1.0, 0.0)[0]
    return model


def told(host, subjects: list, adapters, where: Callable[[int], torch.Tensor]):
    """Hooks whose subjects' places are read as ever, and then told: where(side) is [S, side, side]."""

    class ToldHooks(host.module("nodes.sampling.sampling_run").MoAHooks):
        def _start(self, *args):
            run = super()._start(*args)
            router = run.moa.router
            shares = where(router.size[0]).float()[:, None].expand(-1, router.pictures, -1, -1)
            router.last = lambda: shares
            return run

    return ToldHooks(subjects, adapters=adapters)


def telling(layer, shares: TrainedShares, kind: Kind, area: float, seed: int) -> Callable:
    """A layer's `project` with the shares that its router is told to give."""
    told: dict[int, torch.Tensor] = {}

    def project(h, context):
        projected = type(layer).project(layer, h, context)
        pixels = h.shape[1]
        if pixels not in told:
            told[pixels] = shares.draw(kind, round(pixels**0.5), area, seed).to(projected.share)
        projected.share = told[pixels].expand_as(projected.share)
        return projected

    return project


def comfyui_step(host, model, text_dim: int, side: int, masked: list[dict] | None = None) -> Callable[[], Step]:
    """A function that takes three steps at guidance scale 7, positive and negative in one call, and times the last.

    masked: LoRAs as the host's own hooks, each on a quarter of the picture.
    """
    import comfy.hooks
    import comfy.sample
    import comfy.samplers

    hooks, binding = host.module("nodes.sampling.sampling_run"), host.module("moa_core.subjects.binding")
    attached = model.get_attachment(hooks.KEY)
    bound = () if attached is None else tuple(binding.Binding(3 + n, s) for n, s in enumerate(attached.subjects))
    note = {host.module("nodes.prompt.clip_binding").BOUND_PROMPT: binding.BoundPrompt("a man", bound)}
    positive, negative = ([[torch.randn(1, 77, text_dim), extra]] for extra in (note, {}))
    for file, there in zip(masked or (), quarters(8 * side), strict=False):
        hooked = {"mask": there[None], "hooks": comfy.hooks.create_hook_lora(file, 1.0, 0.0), "mask_strength": 1.0}
        positive, negative = ([*conds, [conds[0][0], hooked]] for conds in (positive, negative))
    latent = torch.zeros(1, 4, side, side)
    noise = comfy.sample.prepare_noise(latent, 0)
    sigmas = model.get_model_object("model_sampling").sigmas[[600, 500, 400, 0]]

    def step() -> Step:
        with Watch(host.module("nodes.sampling.unet_call")) as watch:
            comfy.samplers.sample(
                model, noise, positive, negative, 7.0, model.load_device, comfy.samplers.sampler_object("euler"),
                sigmas, latent_image=latent, disable_pbar=True, callback=watch.after_step,
            )  # fmt: skip
        return watch.step

    return step


def peer_steps(unet, text_dim: int, side: int) -> dict[str, Callable[[], Step]]:
    """The same U-Net in diffusers, alone and with IP-Adapter's attention to the tokens of one picture."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    like = next(unet.parameters())
    latents, text = like.new_zeros(2, 4, side, side), torch.randn(2, 77, text_dim).to(like)
    image = torch.randn(2, 1, IMAGE_TOKENS, text_dim).to(like)
    plain = dict(unet.attn_processors)
    adapted = dict(plain)
    for name in plain:
        if name.endswith("attn2.processor"):
            width = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
            adapted[name] = IPAdapterAttnProcessor2_0(width, text_dim, (IMAGE_TOKENS,)).to(like)

    def step(processors: dict, context) -> Callable[[], Step]:
        def run() -> Step:
            unet.set_attn_processor(dict(processors))
            with Watch(None) as watch:
                watch.after_step(BEFORE)
                unet(latents, 400, context)
                watch.after_step(BEFORE + 1)
            return watch.step

        return run

    return {"diffusers": step(plain, text), "with IP-Adapter": step(adapted, (text, [image]))}


class Watch:
    """Times the last step of a run, and what it takes of memory; calls: the module that records the trace."""

    def __init__(self, calls):
        self.calls, self.step, self._done = calls, Step(0.0), threading.Event()

    def __enter__(self) -> Watch:
        if self.calls is not None:
            self._record, self.calls.record = self.calls.record, self._timed
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        if self.calls is not None:
            self.calls.record = self._record

    def after_step(self, number: int, *_) -> None:
        synchronize()
        if number < BEFORE:
            return
        if number == BEFORE:
            self._watch_memory()
            self.step.recording, self._started = 0.0, time.perf_counter()
            return
        self.step.seconds = time.perf_counter() - self._started
        self._done.set()
        if torch.cuda.is_available():
            self.step.memory = torch.cuda.max_memory_allocated() / 2**20
        else:
            self._watcher.join()

    def _timed(self, *args) -> None:
        synchronize()
        start = time.perf_counter()
        self._record(*args)
        synchronize()
        self.step.recording += time.perf_counter() - start
        learned = args[-1].learned
        self.step.asked = None if learned is None else learned.asked / learned.pixels

    def _watch_memory(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return
        import psutil

        process = psutil.Process()
        before = process.memory_info().rss

        def watch() -> None:
            while not self._done.wait(0.002):
                self.step.memory = max(self.step.memory, (process.memory_info().rss - before) / 2**20)

        self._watcher = threading.Thread(target=watch)
        self._watcher.start()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
