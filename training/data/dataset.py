"""Records of the FFHQ layout made ready to train on: pictures with their subjects.

A data set is a folder: image_ids.txt, image_ids_train.txt, image_ids_test.txt; and each record's files
(records.py) in a folder named after the first five characters of its id.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from training.data.layout import folder_of, read_names
from training.data.preparation import Preparation
from training.data.records import BrokenRecord, Record, read_record

log = logging.getLogger(__name__)

HANDFUL = 5
"""So many broken records never stop a training; beyond, not more than BROKEN_SHARE may be broken."""
BROKEN_SHARE = 0.01
ENOUGH_READ = 1000
"""The share is taken of at least so many records (or of all), for it says little about fewer."""

Background = Literal["neutral", "random"]


class TooManyBroken(RuntimeError):
    """So many records are broken that something is wrong with the data set."""


class BrokenRecords(dict[str, BrokenRecord]):
    """The broken records that a reader met, by name; says so in the log, and stops when they are more than a few."""

    def __init__(self, source: Path, records: int = ENOUGH_READ):
        super().__init__()
        self.source, self.records, self.reads = source, records, 0

    def note(self, name: str, error: BrokenRecord) -> None:
        """Raises TooManyBroken."""
        if name in self:  # in an earlier epoch
            return
        self[name] = error
        log.warning("skipping what is broken: %s", error)
        of = max(self.reads, min(self.records, ENOUGH_READ))
        if len(self) > max(HANDFUL, BROKEN_SHARE * of):
            raise TooManyBroken(
                f"{len(self)} of the {self.reads} records read from {self.source} are broken, more than "
                f"{BROKEN_SHARE:.0%}: the data set seems damaged; repair it or fetch it again. Last: {error}"
            )


class SubjectDataset(Dataset):
    """Pictures with their subjects from a folder, ready to train on; everything follows from (seed, epoch, index).

    A broken record is replaced by the next one, named in the log and kept in `broken`. Raises TooManyBroken when that
    is more than a few.
    """

    def __init__(
        self,
        root: Path,
        preparation: Preparation,
        split: Literal["train", "test", "all"] = "train",
        seed: int = 0,
    ):
        self.root, self.preparation, self.seed = root, preparation, seed
        self.names = read_names(self.root, split)
        self.broken = BrokenRecords(self.root, len(self.names))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor | str]:
        """The record `index` in the first epoch, or `(epoch, index)`: other crops for another epoch."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        return self.preparation(self._next_whole_record(index), np.random.default_rng([self.seed, epoch, index]))

    def _next_whole_record(self, index: int) -> Record:
        for step in range(len(self)):
            name = self.names[(index + step) % len(self)]
            if name in self.broken:
                continue
            self.broken.reads += 1
            try:
                return read_record(folder_of(self.root, name), name, latents=self.preparation.latents)
            except BrokenRecord as error:
                self.broken.note(name, error)
        raise TooManyBroken(f"none of the {len(self)} records in {self.root} is whole; look at the log above")
