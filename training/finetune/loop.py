"""The loop of a finetune."""

from __future__ import annotations

import itertools
import math
import os
import time
from contextlib import closing, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.utils import GradientAccumulationPlugin
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from moa_core.learned.moa_file import save_moa
from training.config import Config, ConfigError
from training.data.latents import check_latents, latents_of
from training.data.loader import batches, first_of_test_set
from training.data.preparation import Preparation
from training.finetune.card import write_card
from training.finetune.checkpoint import CheckpointError, checkpoints, load_checkpoint, save_checkpoint
from training.finetune.contact_sheet import draw_contact_sheet
from training.finetune.methods import METHODS
from training.finetune.model import build, trained
from training.finetune.optimizer import groups, learning_rate, optimizer_type
from training.finetune.signals import stop_on_signal
from training.finetune.sole_run import sole_run
from training.host.pipeline import MoAPipeline

UNSUPPORTED = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM, DistributedType.XLA)
ASKED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}
"""The same, as `accelerate launch` hands it to the processes that it starts."""
MOST_SKIPPED = 5
"""So many steps in a row whose gradient is no number end a training."""


class TrainingFailed(RuntimeError):
    """A sentence for the user."""


def failed(out: Path, how: str) -> TrainingFailed:
    kept = checkpoints(out / "checkpoints")
    last = f"The last good checkpoint is {kept[-1]}: go on from it" if kept else "No checkpoint is kept: start anew"
    return TrainingFailed(f"{how}. {last} with a lower optimizer.lr or with run.precision float32, or look at the data")


def train(config: Config, resume: Path | None = None) -> None:
    """Train to the config's last step, or until SIGTERM; checkpoint and the nodes' file are written either way.

    Raises ConfigError, BaseError, CheckpointError or TrainingFailed, and what data that cannot be read raises.
    """
    run, optim = config.run, config.optimizer
    check_precision(run.precision)
    check_launch()
    accelerator = Accelerator(
        mixed_precision="bf16" if run.precision == "bf16" else "no",
        # As a plugin: of the number alone accelerate would prefer what it finds in its environment.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=optim.accumulate),
        # A batch without any subject leaves the subject prompt without a gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if accelerator.distributed_type in UNSUPPORTED:
        raise unsupported(accelerator.distributed_type.value)
    with sole_run(Path(run.out)) if accelerator.is_main_process else nullcontext():
        _train(config, resume, accelerator)


def _train(config: Config, resume: Path | None, accelerator: Accelerator) -> None:
    run, optim = config.run, config.optimizer
    adamw = optimizer_type(optim.eight_bit)
    torch.manual_seed(run.seed)
    base, moa, model = build(config)
    base.to(accelerator.device)
    preparation = Preparation.of(config.data, base.picture_size, moa.image_encoder.size)
    if config.data.cached_latents:
        check_latents(Path(config.data.root), base.autoencoder, preparation.size)
    if run.checkpointing:
        base.unet.enable_gradient_checkpointing()
    parameters = trained(model)
    optimizer = adamw(groups(parameters, optim.prompt_lr), weight_decay=optim.weight_decay)
    wrapped = accelerator.prepare(model)
    pipeline = MoAPipeline(base, moa, model.unet)

    out = Path(run.out)
    state = load_checkpoint(resume, parameters, optimizer) if resume else {}
    step = state.get("step", 0)
    records = optim.batch * accelerator.num_processes * optim.accumulate  # in a step
    # Of the run, however many processes took its steps so far; older checkpoints do not say.
    seen = state.get("records", step * records)
    passes = batches(config, preparation, accelerator, first=seen)
    shown = first_of_test_set(config, preparation).to(accelerator.device) if run.validate_every else None
    main = accelerator.is_main_process
    # What an earlier start has drawn beyond the checkpoint that this one goes on from is drawn anew.
    writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1) if main else None
    bar = tqdm(initial=step, total=optim.steps, unit="step", disable=not main, mininterval=1.0)

    def save(keep: int = run.keep) -> None:
        if not main:
            return
        if not all(parameter.detach().half().isfinite().all() for parameter in parameters.values()):
            raise failed(out, f"By step {step} weights had grown to what is no number (NaN or infinite)")
        state = {"step": step, "records": seen, "config": config.to_dict()}
        checkpoint = save_checkpoint(out / "checkpoints", parameters, optimizer, state, keep)
        if write := METHODS[config.model.method].save:
            try:
                write(moa, out / run.file)
            except OSError as error:
                raise CheckpointError(
                    f"{error}. {checkpoint} is whole: make room on the disk and go on with --resume latest"
                ) from error

    # Closed whatever happens: readers that ignore signals would keep the process from ending.
    with closing(passes), stop_on_signal() as stop:
        seconds, first, skipped, in_a_row = 0.0, step, 0, 0
        figures: dict[str, float] = {}
        while step < optim.steps and not _any(accelerator, bool(stop)):
            for group in optimizer.param_groups:
                group["lr"] = group["factor"] * learning_rate(optim, step)
            began, figures = time.monotonic(), {}
            for batch, chance in itertools.islice(passes, optim.accumulate):
                with accelerator.accumulate(wrapped):
                    losses = wrapped(latents_of(batch, chance, base.autoencoder), batch, chance)
                    accelerator.backward(losses["loss"])
                for name, value in losses.items():
                    figures[name] = figures.get(name, 0.0) + float(value.detach()) / optim.accumulate
            figures["norm"] = float(accelerator.clip_grad_norm_(parameters.values(), optim.clip))
            good = math.isfinite(figures["norm"])  # the same in all processes
            if good:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            skipped, in_a_row = skipped + (not good), 0 if good else in_a_row + 1
            if in_a_row == MOST_SKIPPED:
                save(run.keep + 1)  # beside the others: it may be on the way to where it failed
                raise failed(
                    out,
                    f"{MOST_SKIPPED} steps in a row, up to step {step + 1}, gave a gradient that is no number (NaN or "
                    "infinite)",
                )
            figures["skipped"] = skipped
            step, seen = step + 1, seen + records
            seconds += time.monotonic() - began
            figures["images/s"] = (step - first) * records / seconds
            bar.update()
            if main:
                bar.set_postfix({name: f"{value:.3g}" for name, value in figures.items()}, refresh=False)
                for name, value in figures.items():
                    writer.add_scalar(name, value, step)
            if step % run.save_every == 0:
                save()
            if main and shown and step % run.validate_every == 0:
                draw_contact_sheet(pipeline, shown, out / f"step-{step:08d}.png")
    if main:
        save()
        if step >= optim.steps and METHODS[config.model.method].save is save_moa:
            write_card(out / run.file, moa, config, seen, figures)
        writer.close()
        bar.close()
        print(f"{'finished' if step >= optim.steps else 'stopped'} at step {step}; {out / run.file}")
    accelerator.end_training()


def check_launch() -> None:
    """Raises ConfigError for what `accelerate launch` may have been told and this training does not support.

    Asked before accelerate looks for the packages that it would need for it.
    """
    for name, kind in ASKED.items():
        if os.environ.get(name, "false").lower() in ("true", "1", "yes"):
            raise unsupported(kind)


def unsupported(kind: str) -> ConfigError:
    return ConfigError(
        f"accelerate was told to use {kind}: this training runs on one device, or with DDP on several. Its parameters "
        "are few; answer no to DeepSpeed, FSDP and the like in `accelerate config`"
    )


def check_precision(precision: str) -> None:
    """Raises ConfigError where the device has no such numbers."""
    lacking = None
    if torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        lacking = torch.cuda.get_device_name()
    elif torch.backends.mps.is_available() and not torch.backends.mps.is_macos_or_newer(14, 0):
        lacking = "Metal before macOS 14"
    if precision == "bf16" and lacking:
        raise ConfigError(
            f"run.precision is bf16, which {lacking} does not compute in: set it to float32, and run.checkpointing to "
            "true if memory runs short"
        )


def _any(accelerator: Accelerator, flag: bool) -> bool:
    """Whether any process says so: all must stop at the same step."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device)) > 0)
