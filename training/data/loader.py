"""Batches of a run, in order, each with its records' randomness."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator
from torch.utils.data import DataLoader

from training.config import Config
from training.data.batch import Batch, Chance, EndlessSampler, collate
from training.data.dataset import SubjectDataset
from training.data.preparation import Preparation
from training.data.readers import read
from training.data.shards import ShardDataset, find_shards

SHOWN = 8
"""Records of the test split on a contact sheet."""


def batches(
    config: Config, preparation: Preparation, accelerator: Accelerator, first: int
) -> Iterator[tuple[Batch, Chance]]:
    """Passes of this process from the first-th record of the run on, each with its records' randomness."""
    optim, count, size = config.optimizer, accelerator.num_processes, (preparation.size // 8,) * 2
    for n, batch in enumerate(read(loader(config, preparation, first, accelerator.process_index, count))):
        number = first + (n * count + accelerator.process_index) * optim.batch
        chance = Chance.of(config.run.seed, number, optim.batch, size, config.loss)
        yield batch.to(accelerator.device), chance.to(accelerator.device)


def loader(config: Config, preparation: Preparation, first: int, process: int, processes: int) -> DataLoader:
    """Endless batches of one process. A folder of records starts at the first-th; shards start at a random place."""
    root, batch, seed = Path(config.data.root), config.optimizer.batch, config.run.seed
    options = {"collate_fn": collate, "num_workers": config.data.workers, "worker_init_fn": leave_signals}
    if find_shards(root, "train"):
        return DataLoader(ShardDataset(root, preparation, "train", seed + first, process, processes), batch, **options)
    records = SubjectDataset(root, preparation, "train", seed)
    order = EndlessSampler(len(records), batch, seed, first, process, processes)
    return DataLoader(records, batch_sampler=order, **options)


def leave_signals(worker: int) -> None:
    """SIGTERM and Ctrl-C reach a whole process group: a reader must live on until the training has saved."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def first_of_test_set(config: Config, preparation: Preparation) -> Batch:
    """What the contact sheet shows: whole squares from the middle."""
    root, preparation = Path(config.data.root), replace(preparation, augment=False, cached_latents=False)
    if find_shards(root, "test"):
        return collate(list(itertools.islice(ShardDataset(root, preparation, "test", config.run.seed), SHOWN)))
    records = SubjectDataset(root, preparation, "test", config.run.seed)
    return collate([records[n] for n in range(min(SHOWN, len(records)))])
