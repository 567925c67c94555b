"""The loop that trains the parts of the toy base model, and the pictures that they learn from.

A run folder holds everything of one training; each part keeps one file there, <part>.safetensors, with
weights, their moving average and the optimizer's state. All randomness of a step follows from (seed, step),
so a run that goes on from its file is the run that was never stopped.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import ModelMixin
from diffusers.models.attention_processor import AttnProcessor
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from moa_core.files.whole_file import whole
from training.finetune.signals import stop_on_signal
from training.host.base import Base
from training.host.toy_base import load_toy

SAVE_MINUTES = 5.0
WARMUP = 100
"""Steps in which the learning rate rises to its value."""
EMA = 0.999
CLIP = 1.0


@dataclass(frozen=True)
class Plan:
    """How one part is trained; written into its file."""

    run: Path
    steps: int
    """Train up to this step; the learning rate falls to nothing along a cosine that ends there."""
    minutes: float | None = None
    """Stop early after so many minutes, counted from this start."""
    resume: bool = False
    seed: int = 0
    batch: int = 16
    lr: float = 1e-3
    scenes: int = 20_000
    """Pictures rendered once into the run folder."""
    workers: int = 1
    """Processes that render them."""
    base: Path | None = None
    """A base model's checkpoint: what ControlNet and LoRA are trained on, or what the base model itself starts from."""
    compiled: bool = False
    """Compile the loss first: it takes a minute and a C++ compiler, and is faster from then on."""

    def loss(self, function: Callable) -> Callable:
        """The loss as it is to be called in every step."""
        return torch.compile(function) if self.compiled else function

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rising, falling = min(1.0, (step + 1) / WARMUP), (1 + math.cos(math.pi * step / self.steps)) / 2
        return self.lr * rising * falling


def base_of(plan: Plan) -> Base:
    """The base model that the plan names. Raises ValueError where there is none."""
    if plan.base is None or not plan.base.exists():
        raise ValueError(f"{plan.base} does not exist: give --base the checkpoint that `assemble` wrote")
    return load_toy(plan.base)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast() -> torch.autocast | nullcontext:
    """bfloat16 where it is multiplied fast: on CUDA, and on a CPU that has it; elsewhere float32 is faster."""
    cpu = torch.cpu.get_capabilities()
    fast = device().type == "cuda" or cpu.get("amx_bf16", False) or cpu.get("avx512_bf16", False)
    return torch.autocast(device().type, torch.bfloat16) if fast else nullcontext()


def plain_attention(*networks: ModelMixin) -> None:
    """Attention in plain steps where the fused one's backward is slow: in bfloat16 on a CPU."""
    if device().type == "cpu" and isinstance(autocast(), torch.autocast):
        for network in networks:
            network.set_attn_processor(AttnProcessor())


def generator(seed: int, step: int) -> torch.Generator:
    """All randomness of one step, on the CPU whatever the device."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, step]).generate_state(1)[0]))


class Trainee:
    """What learns of a model, its moving average and its optimizer, in one file.

    `step` and `seconds` say how far it is. Frozen parameters are not kept.
    """

    def __init__(self, name: str, model: nn.Module, plan: Plan):
        self.path = plan.run / f"{name}.safetensors"
        self.name, self.plan, self.step, self.seconds = name, plan, 0, 0.0
        self.model = model.to(device())
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._frozen = {name for name, _ in model.named_parameters()} - self.parameters.keys()
        self.average = {k: v.detach().clone() for k, v in self.state().items() if v.is_floating_point()}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), plan.lr, (0.9, 0.99), weight_decay=0.0, fused=True)
        if plan.resume:
            self._load()
        elif self.path.exists():
            raise ValueError(f"{self.path} is there already: go on with --resume, or give another --run")

    def state(self) -> dict[str, Tensor]:
        """The model's state without what is frozen."""
        return {name: value for name, value in self.model.state_dict().items() if name not in self._frozen}

    def update(self, loss: Tensor) -> None:
        """One optimizer step."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), CLIP)
        self.optimizer.step()
        self.step += 1
        state = self.state()
        decay = min(EMA, self.step / (self.step + 10))
        torch._foreach_lerp_(list(self.average.values()), [state[k] for k in self.average], 1 - decay)

    def save(self) -> None:
        """All of it or nothing, even when stopped halfway."""
        tensors = {f"model.{k}": v for k, v in self.state().items()}
        tensors |= {f"average.{k}": v for k, v in self.average.items()}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        tensors = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        plan = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self.plan).items()}
        progress = {"step": self.step, "seconds": self.seconds, "plan": plan}
        with whole(self.path) as unfinished:
            save_file(tensors, unfinished, {"progress": json.dumps(progress)})

    def _load(self) -> None:
        tensors, progress = read(self.path)
        for name in ("steps", "lr", "batch", "seed"):
            before, now = progress["plan"][name], getattr(self.plan, name)
            if before != now:  # it would go on as another run, along another curve
                raise ValueError(f"{self.path} is of a run with --{name} {before}, not {now}: go on with the same")
        self.step, self.seconds = progress["step"], progress["seconds"]
        self.model.load_state_dict({k: tensors[f"model.{k}"] for k in self.state()}, strict=False)
        for name, value in self.average.items():
            value.copy_(tensors[f"average.{name}"])
        for name, parameter in self.parameters.items():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = tensors[f"optimizer.{key}.{name}"].to(parameter.device)
                if key != "step":  # AdamW keeps its moments in the parameter's layout
                    value = torch.empty_like(parameter).copy_(value)
                self.optimizer.state[parameter][key] = value


def read(path: Path) -> tuple[dict[str, Tensor], dict]:
    """A part's tensors and progress. Raises ValueError where there is no such file."""
    if not path.exists():
        raise ValueError(f"{path} does not exist: train this part first (python -m training.toy {path.stem})")
    with safe_open(path, "pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, json.loads(file.metadata()["progress"])  # noqa: SIM118


def read_average(path: Path, model: nn.Module) -> int:
    """Gives the model the averaged weights of a part's file; returns the step they come from."""
    tensors, progress = read(path)
    prefix = "average."
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    model.load_state_dict(weights, strict=False)
    return progress["step"]


def train(
    trainee: Trainee,
    loss_of: Callable[[torch.Generator], tuple[Tensor, dict[str, float | Tensor]]],
    look: Callable[[Path], str],
) -> None:
    """Steps until the plan is fulfilled or SIGTERM comes; saves every SAVE_MINUTES and at the end.

    loss_of: one step's randomness -> its loss, and figures for the progress bar. look: draws a picture of
    what the averaged weights can do into a file, and returns figures in words.
    """
    with stop_on_signal() as stop:
        _train(trainee, loss_of, look, stop)


def _train(trainee: Trainee, loss_of: Callable, look: Callable, stop: list[int]) -> None:
    plan, model = trainee.plan, trainee.model
    start = saved = time.monotonic()
    before, first = trainee.seconds, trainee.step
    smooth: dict[str, float] = {}
    bar = tqdm(initial=first, total=plan.steps, unit="step", desc=trainee.name, mininterval=1.0)
    while not stop and trainee.step < plan.steps:
        now = time.monotonic()
        if plan.minutes is not None and now - start > plan.minutes * 60:
            break
        if now - saved > SAVE_MINUTES * 60:
            _save(trainee, look, bar)
            saved = time.monotonic()
        model.train()
        with autocast():
            loss, figures = loss_of(generator(plan.seed, trainee.step))
        trainee.update(loss)
        trainee.seconds = before + time.monotonic() - start
        if trainee.step % 10 == 0:
            for key, value in {"loss": loss.detach(), **figures}.items():
                smooth[key] = 0.9 * smooth.get(key, float(value)) + 0.1 * float(value)
            rate = plan.batch * (trainee.step - first) / (trainee.seconds - before)
            bar.set_postfix({k: f"{v:.4f}" for k, v in smooth.items()} | {"images/s": f"{rate:.1f}"}, refresh=False)
        bar.update()
    _save(trainee, look, bar)
    bar.close()


def _save(trainee: Trainee, look: Callable[[Path], str], bar: tqdm) -> None:
    """The file, a picture beside it, and one line that says how far it is."""
    trainee.save()
    weights = {k: v.clone() for k, v in trainee.state().items()}
    trainee.model.load_state_dict(trainee.average, strict=False)
    with torch.no_grad():
        figures = look(trainee.path.with_suffix(".png"))
    trainee.model.load_state_dict(weights, strict=False)
    line = f"{trainee.name}: step {trainee.step}, {trainee.seconds / 60:.1f} minutes, {bar.postfix or ''}, {figures}"
    bar.write(line)
    with (trainee.path.with_suffix(".log")).open("a", encoding="utf-8") as log:
        log.write(line + "\n")
