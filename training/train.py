"""python -m training.train --config FILE: the finetune of a MoA. Runs under `accelerate launch` unchanged."""

from __future__ import annotations

import argparse
import itertools
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from moa_core.moa_file import save_moa
from training.batch import Batch, Chance, EndlessSampler, collate
from training.checkpoint import CheckpointError, checkpoints, load_checkpoint, save_checkpoint, stop_on_signal
from training.config import Config, ConfigError, Optimizer, read_config
from training.data import EmptySplit, SubjectDataset, TooManyBroken
from training.finetune import build, trained
from training.host.base import BaseError
from training.host.pipeline import MoAPipeline
from training.latents import check_latents, latents_of
from training.shards import ShardDataset, find_shards
from training.validate import draw_sheet

SHOWN = 8
"""Records of the test split on a contact sheet."""


def train(config: Config, resume: Path | None = None) -> None:
    """Train to the config's last step, or until SIGTERM; checkpoint and MoA file are written either way."""
    run, optim = config.run, config.optimizer
    accelerator = Accelerator(
        mixed_precision="bf16" if run.precision == "bf16" else "no",
        gradient_accumulation_steps=optim.accumulate,
        # A batch without any subject leaves the subject prompt without a gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    torch.manual_seed(run.seed)
    base, moa, model = build(config)
    base.to(accelerator.device)
    if config.data.cached_latents:
        check_latents(Path(config.data.root), base.autoencoder, config.data.size)
    if run.checkpointing:
        base.unet.enable_gradient_checkpointing()
    parameters = trained(model)
    optimizer = torch.optim.AdamW(groups(parameters, optim.prompt_lr), weight_decay=optim.weight_decay)
    wrapped = accelerator.prepare(model)
    pipeline = MoAPipeline(base, moa, model.unet)

    out = Path(run.out)
    step = load_checkpoint(resume, parameters, optimizer)["step"] if resume else 0
    records = optim.batch * accelerator.num_processes * optim.accumulate  # in a step
    passes = batches(config, accelerator, first=step * records)
    shown = first_of_test_set(config).to(accelerator.device) if run.validate_every else None
    main = accelerator.is_main_process
    writer = SummaryWriter(str(out / "tensorboard")) if main else None
    bar = tqdm(initial=step, total=optim.steps, unit="step", disable=not main, mininterval=1.0)

    def save() -> None:
        if main:
            save_checkpoint(
                out / "checkpoints", parameters, optimizer, {"step": step, "config": config.to_dict()}, run.keep
            )
            if config.model.method != "ip_adapter":  # which is no MoA
                save_moa(moa, out / run.file)

    with stop_on_signal() as stop:
        seconds, first = 0.0, step
        while step < optim.steps and not _any(accelerator, bool(stop)):
            for group in optimizer.param_groups:
                group["lr"] = group["factor"] * learning_rate(optim, step)
            began = time.monotonic()
            figures: dict[str, float] = {}
            for batch, chance in itertools.islice(passes, optim.accumulate):
                with accelerator.accumulate(wrapped):
                    losses = wrapped(latents_of(batch, chance, base.autoencoder), batch, chance)
                    accelerator.backward(losses["loss"])
                for name, value in losses.items():
                    figures[name] = figures.get(name, 0.0) + float(value.detach()) / optim.accumulate
            figures["norm"] = float(accelerator.clip_grad_norm_(parameters.values(), optim.clip))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
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
                draw_sheet(pipeline, shown, out / f"step-{step:08d}.png")
    if main:
        save()
        writer.close()
        bar.close()
        print(f"{'finished' if step >= optim.steps else 'stopped'} at step {step}; MoA file: {out / run.file}")
    accelerator.end_training()


def learning_rate(optim: Optimizer, step: int) -> float:
    """The rate of a step, counted from 0."""
    rising, left = (step + 1) / max(optim.warmup, 1), (optim.steps - step) / max(optim.cooldown, 1)
    return optim.lr * min(1.0, rising, left)


def groups(parameters: dict[str, nn.Parameter], prompt_factor: float) -> list[dict]:
    """The optimizer's groups with their multiples of the learning rate: the subject prompt, and all others."""
    prompt = [parameter for name, parameter in parameters.items() if "subject_prompt" in name]
    others = [parameter for name, parameter in parameters.items() if "subject_prompt" not in name]
    return [{"params": others, "factor": 1.0}, {"params": prompt, "factor": prompt_factor}]


def batches(config: Config, accelerator: Accelerator, first: int) -> Iterator[tuple[Batch, Chance]]:
    """Passes of this process from the first-th record of the run on, each with its records' randomness."""
    data, optim, count = config.data, config.optimizer, accelerator.num_processes
    size = (data.size // 8, data.size // 8)
    for n, batch in enumerate(loader(config, first, accelerator.process_index, count)):
        number = first + (n * count + accelerator.process_index) * optim.batch
        chance = Chance.of(config.run.seed, number, optim.batch, size, config.loss)
        yield batch.to(accelerator.device), chance.to(accelerator.device)


def loader(config: Config, first: int, process: int, processes: int) -> DataLoader:
    """Endless batches of one process. A folder of records starts at the first-th; shards start at a random place."""
    data, batch, seed = config.data, config.optimizer.batch, config.run.seed
    reading = _reading(config) | {"smallest_crop": data.smallest_crop, "cached_latents": data.cached_latents}
    options = {"collate_fn": collate, "num_workers": data.workers, "worker_init_fn": leave_signals}
    if find_shards(Path(data.root), "train"):
        reading |= {"seed": seed + first, "process": process, "processes": processes}
        return DataLoader(ShardDataset(split="train", **reading), batch, **options)
    records = SubjectDataset(split="train", **reading)
    order = EndlessSampler(len(records), batch, seed, first, process, processes)
    return DataLoader(records, batch_sampler=order, **options)


def leave_signals(worker: int) -> None:
    """SIGTERM and Ctrl-C reach a whole process group: a reader must live on until the training has saved."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def first_of_test_set(config: Config) -> Batch:
    """What the contact sheet shows."""
    reading = _reading(config) | {"split": "test", "augment": False}
    if find_shards(Path(config.data.root), "test"):
        return collate(list(itertools.islice(ShardDataset(**reading), SHOWN)))
    records = SubjectDataset(**reading)
    return collate([records[n] for n in range(min(SHOWN, len(records)))])


def _reading(config: Config) -> dict:
    """What all reading shares."""
    from transformers import CLIPVisionConfig

    data = config.data
    return {
        "root": Path(data.root),
        "size": data.size,
        "reference_size": CLIPVisionConfig.from_pretrained(config.model.image_encoder).image_size,
        "max_subjects": data.max_subjects,
        "min_area": data.min_area,
        "reference_background": data.background,
        "seed": config.run.seed,
    }


def _any(accelerator: Accelerator, flag: bool) -> bool:
    """Whether any process says so: all must stop at the same step."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device)) > 0)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.train", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--config", type=Path, required=True, help="a YAML file: training/configs/toy.yaml, ffhq.yaml")
    parser.add_argument("--resume", help="'latest', or the folder of a checkpoint")
    args = parser.parse_args(argv)
    try:
        config = read_config(args.config)
        train(config, find_checkpoint(Path(config.run.out) / "checkpoints", args.resume))
    except (ConfigError, BaseError, CheckpointError, EmptySplit, TooManyBroken, FileNotFoundError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def find_checkpoint(folder: Path, resume: str | None) -> Path | None:
    """What to go on from. Raises CheckpointError rather than start anew where a run is already."""
    there = checkpoints(folder)
    if resume is None:
        if there:
            raise CheckpointError(
                f"{folder} holds checkpoints already: go on with --resume latest, or give another run.out"
            )
        return None
    if resume == "latest" and not there:
        raise CheckpointError(f"{folder} holds no whole checkpoint to resume from; start without --resume")
    return there[-1] if resume == "latest" else Path(resume)


if __name__ == "__main__":
    sys.exit(main())
