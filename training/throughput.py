"""python -m training.throughput: speed, memory and utilisation of one finetune step at the size of SD 1.5.

Random weights at 512x512, one subject a record, pictures already read: what the device does, not the disk. FLOPs are
counted over a step's forward and backward, with what gradient checkpointing computes a second time. Utilisation is
FLOPs/s over what a large matmul of the same precision reaches on this device in the same run.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from moa_core.learned.moa import MoA
from training.config import Loss, Model, Optimizer
from training.data.batch import Batch, Chance, collate
from training.data.latents import latents_of
from training.finetune.model import Finetune, trained
from training.finetune.optimizer import groups
from training.host import sd15
from training.host.base import Base, KLAutoencoder

BATCHES = {"cuda": (1, 2, 4, 8, 16, 32), "cpu": (1,)}
IMAGES = 40_000 * 128
"""The paper's run (Table 1): steps x images."""
ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
    ),
}
"""Attention that torch's counter does not know."""


@dataclass(frozen=True)
class Setting:
    """One setting and what it reaches; nothing where memory ran out. tflop: of one image; utilisation: 0 to 1."""

    batch: int
    checkpointing: bool
    cached_latents: bool
    images_per_s: float | None = None
    peak_gib: float | None = None
    tflop: float | None = None
    utilisation: float | None = None

    def __str__(self) -> str:
        setting = f"{self.batch:5}  {_yes(self.checkpointing):13}  {_yes(self.cached_latents):14}"
        if self.images_per_s is None:
            return f"{setting}  out of memory"
        return (
            f"{setting}  {self.images_per_s:8.4g}  {self.batch / self.images_per_s:7.4g}  {self.peak_gib:8.1f}"
            f"  {self.tflop:11.2f}  {self.images_per_s * self.tflop:8.4g}  {self.utilisation:11.1%}"
        )


HEADING = "batch  checkpointing  cached latents  images/s   s/step  peak GiB  TFLOP/image  TFLOP/s   utilisation"


def random_sd15() -> tuple[Base, MoA]:
    base = Base(sd15.unet(), sd15.text_encoder(), KLAutoencoder(sd15.autoencoder()), "SD 1.5")
    return base, MoA.from_prior(base.unet.state_dict())


class Stepper:
    """A finetune on its device, with an optimizer of its own: bf16 on a GPU, float32 on a CPU."""

    def __init__(self, base: Base, moa: MoA, device: torch.device):
        self.base, self.device = base.to(device), device
        self.size, self.reference_size = base.unet.config.sample_size, moa.image_encoder.size
        self.model = Finetune(base, moa, Loss(dropped=0.0), Model.trainable_encoder_layers).to(device)
        self.parameters = trained(self.model)

    def step(self, optimizer: torch.optim.Optimizer, batch: Batch, chance: Chance) -> None:
        """As training/train.py takes it."""
        latents = latents_of(batch, chance, self.base.autoencoder)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            losses = self.model(latents, batch, chance)
        losses["loss"].backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), Optimizer.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def optimizer(self) -> torch.optim.AdamW:
        return torch.optim.AdamW(groups(self.parameters, Optimizer.prompt_lr), lr=Optimizer.lr)

    def inputs(self, batch: int, cached: bool) -> tuple[Batch, Chance]:
        """Records of noise whose subject fills the middle."""
        h, r = self.size, self.reference_size
        masks = torch.zeros(1, 8 * h, 8 * h)
        masks[:, 2 * h : 6 * h, 2 * h : 6 * h] = 1
        item = {
            "caption": "a man on a beach",
            "picture": torch.rand(3, 8 * h, 8 * h) * 2 - 1,
            "references": torch.randn(1, 3, r, r),
            "masks": masks,
            "positions": torch.tensor([len("a man")]),
            "valid": torch.tensor([True]),
        }
        if cached:
            item["moments"] = torch.rand(2, 4, h, h)
        chance = Chance.of(0, 0, batch, (h, h), self.model.loss)
        return collate([item] * batch).to(self.device), chance.to(self.device)

    def forget(self) -> None:
        """Let go of what an interrupted step left behind."""
        self.model.unet.call = None
        self.model.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def time_step(stepper: Stepper, setting: Setting, steps: int, matmul: float) -> Setting:
    """The setting with its figures; matmul: FLOPs/s. The first of the steps is for counting and warming up alone."""
    unet = stepper.base.unet
    unet.enable_gradient_checkpointing() if setting.checkpointing else unet.disable_gradient_checkpointing()
    reset_peak(stepper.device)
    try:
        optimizer, inputs = stepper.optimizer(), stepper.inputs(setting.batch, setting.cached_latents)
        with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
            stepper.step(optimizer, *inputs)
        seconds = statistics.median(timed(lambda: stepper.step(optimizer, *inputs)) for _ in range(steps))
    except (torch.OutOfMemoryError, MemoryError):
        return setting
    except RuntimeError as error:  # what a CPU's allocator says
        if "can't allocate memory" not in str(error):
            raise
        return setting
    speed, flops = setting.batch / seconds, counter.get_total_flops() / setting.batch
    return Setting(
        setting.batch,
        setting.checkpointing,
        setting.cached_latents,
        images_per_s=speed,
        peak_gib=peak(stepper.device) / 2**30,
        tflop=flops / 1e12,
        utilisation=speed * flops / matmul,
    )


def timed(work: Callable[[], object]) -> float:
    """Seconds, all that the GPU was given included."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def matmul_speed(device: torch.device) -> float:
    """FLOPs/s of a large matmul in the training's precision."""
    side, kind = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    times = [timed(lambda: a @ b) for _ in range(10)]
    return 2 * side**3 / statistics.median(times[3:])


def reset_peak(device: torch.device) -> None:
    """Memory's height counts from here. On a CPU it is the process's resident set, as Linux keeps it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: torch.device) -> int:
    """Bytes: allocated on the GPU, or resident in the CPU's memory, with what the allocator keeps of earlier rows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def hours(rows: list[Setting]) -> float | None:
    """Of one such device for IMAGES, at the best row's speed; None where memory sufficed for none."""
    best = max((row.images_per_s for row in rows if row.images_per_s), default=None)
    return best and IMAGES / best / 3600


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"


def main(argv: list[str] | None = None, make: Callable[[], tuple[Base, MoA]] = random_sd15) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.throughput", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--batches", type=int, nargs="+", help="records in a step (default 1 to 32, on a CPU 1)")
    parser.add_argument("--steps", type=int, default=5, help="their median is taken (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args(argv)
    gpu, text = torch.cuda.is_available(), sys.stderr if args.json else sys.stdout
    device = torch.device("cuda" if gpu else "cpu")
    name = f"{torch.cuda.get_device_name()}, bf16" if gpu else f"CPU, {torch.get_num_threads()} threads, float32"
    matmul = matmul_speed(device)
    print(f"{name}; a large matmul: {matmul / 1e12:.4g} TFLOP/s\n{HEADING}", file=text, flush=True)
    stepper, rows = Stepper(*make(), device), []
    for cached, checkpointing, batch in product((False, True), (True, False), args.batches or BATCHES[device.type]):
        rows.append(time_step(stepper, Setting(batch, checkpointing, cached), args.steps, matmul))
        stepper.forget()
        print(rows[-1], file=text, flush=True)
    if total := hours(rows):
        print(f"40,000 steps x 128 images at the best row's speed: {total:,.0f} hours of one such device", file=text)
    if args.json:
        rows = [asdict(row) for row in rows]
        print(json.dumps({"device": name, "matmul_tflops": matmul / 1e12, "rows": rows, "hours": total}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
