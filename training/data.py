"""Records of the FFHQ layout made ready to train on: pictures with their subjects.

A data set is a folder: image_ids.txt, image_ids_train.txt, image_ids_test.txt; and each record's files
(records.py) in a folder named after the first five characters of its id.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from moa_core.reference import MARGIN, SMALLEST, prepare_reference
from training.records import BrokenRecord, Record, Segment, read_record

log = logging.getLogger(__name__)

HANDFUL = 5
"""So many broken records never stop a training; beyond, not more than BROKEN_SHARE may be broken."""
BROKEN_SHARE = 0.01
ENOUGH_READ = 1000
"""The share is taken of at least so many records (or of all), for it says little about fewer."""

Background = Literal["neutral", "random"]


class EmptySplit(ValueError):
    """A split of the data set lists no record."""


class TooManyBroken(RuntimeError):
    """So many records are broken that something is wrong with the data set."""


@dataclass(frozen=True)
class Preparation:
    """How a record becomes an item to train on.

    With `augment`, a random square of the picture is taken, its side between `smallest_crop` and 1 times the
    shorter side; without it, the largest square in the middle. Subjects that then cover less than `min_area`
    of the square are left out, and of more than `max_subjects` the largest are kept, in the caption's order.
    The references come from the whole picture; what is not the subject becomes the neutral colour of the
    image encoder, or a random one. `cached_latents` (latents.py) are those of the square in the middle, which is
    then taken whatever `augment` says.
    """

    size: int = 128
    reference_size: int = 64
    max_subjects: int = 4
    augment: bool = True
    smallest_crop: float = 1.0
    min_area: float = 0.01
    reference_background: Background = "neutral"
    cached_latents: bool = False

    @property
    def latents(self) -> int | None:
        """The size whose cached latents a record must have; None where they are not read."""
        return self.size if self.cached_latents else None

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, Tensor | str]:
        """An item, with S = max_subjects, H = W = size and R = reference_size.

        id, caption   text
        picture       [3, H, W] in -1..1
        references    [S, 3, R, R], each subject's picture as the image encoder takes it
        masks         [S, H, W], 1 where the subject is visible, 0 elsewhere
        positions     [S], the character of the caption before which the subject's noun phrase ends (its `end`)
        valid         [S] bool; the entries of the other tensors are 0 where it is False
        moments       [2, 4, size / 8, size / 8], mean and standard deviation of the latents; if they are cached
        """
        box = self._crop(record.image.size, rng)
        square = (self.size, self.size)
        # Nearest keeps ids whole; taken in the same box as the picture, so both stay aligned.
        ids = Image.fromarray(record.ids.astype(np.int32)).resize(square, Image.Resampling.NEAREST, box)
        masks = [torch.from_numpy(np.asarray(ids) == segment.id) for segment in record.segments]
        kept = self._keep(masks, record.segments)

        s, r = self.max_subjects, self.reference_size
        item = {
            "id": record.id,
            "caption": record.caption,
            "picture": cut(record.image, box, self.size),
            "references": torch.zeros(s, 3, r, r),
            "masks": torch.zeros(s, self.size, self.size),
            "positions": torch.zeros(s, dtype=torch.long),
            "valid": torch.zeros(s, dtype=torch.bool),
        }
        if record.moments is not None:
            item["moments"] = record.moments
        pixels = _to_tensor(record.image)
        for slot, n in enumerate(kept):
            mask = torch.from_numpy(record.ids == record.segments[n].id).float()
            if self.reference_background == "random":
                colour = torch.from_numpy(rng.random(3, dtype=np.float32))
                item["references"][slot] = prepare_reference(on_colour(pixels, mask, colour), None, r)
            else:
                item["references"][slot] = prepare_reference(pixels, mask, r)
            item["masks"][slot] = masks[n]
            item["positions"][slot] = record.segments[n].end
            item["valid"][slot] = True
        return item

    def _crop(self, size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int, int, int]:
        """left, top, right, bottom of a square inside the picture."""
        if not self.augment or self.cached_latents:
            return middle(size)
        width, height = size
        side = round(min(size) * rng.uniform(self.smallest_crop, 1))
        left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
        return left, top, left + side, top + side

    def _keep(self, masks: list[Tensor], segments: list[Segment]) -> list[int]:
        """The numbers of the segments large enough to learn from, in the caption's order."""
        areas = [float(mask.float().mean()) for mask in masks]
        kept = [n for n, area in enumerate(areas) if area >= self.min_area]
        kept = sorted(kept, key=lambda n: -areas[n])[: self.max_subjects]
        return sorted(kept, key=lambda n: segments[n].end)


class BrokenRecords(dict[str, BrokenRecord]):
    """The broken records that a reader met, by name; says so in the log, and stops when they are more than a few."""

    def __init__(self, source: Path, records: int = ENOUGH_READ):
        super().__init__()
        self.source, self.records, self.reads = source, records, 0

    def note(self, name: str, error: BrokenRecord) -> None:
        """Raises TooManyBroken."""
        self[name] = error
        log.warning("skipping a broken record: %s", error)
        of = max(self.reads, min(self.records, ENOUGH_READ))
        if len(self) > max(HANDFUL, BROKEN_SHARE * of):
            raise TooManyBroken(
                f"{len(self)} of the {self.reads} records read from {self.source} are broken, more than "
                f"{BROKEN_SHARE:.0%}: the data set seems damaged; repair it or fetch it again. Last: {error}"
            )


class SubjectDataset(Dataset):
    """Pictures with their subjects from a folder, ready to train on; everything follows from (seed, epoch, index).

    preparation: the fields of Preparation. A broken record is replaced by the next one, named in the log and
    kept in `broken`. Raises TooManyBroken when that is more than a few.
    """

    def __init__(
        self,
        root: str | Path,
        split: Literal["train", "test", "all"] = "train",
        seed: int = 0,
        **preparation,
    ):
        self.root, self.preparation, self.seed = Path(root), Preparation(**preparation), seed
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
                return read_record(self.root / name[:5], name, latents=self.preparation.latents)
            except BrokenRecord as error:
                self.broken.note(name, error)
        raise TooManyBroken(f"none of the {len(self)} records in {self.root} is whole; look at the log above")


def middle(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """left, top, right, bottom of the largest square in the middle of a picture of this width and height."""
    width, height = size
    side = min(size)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def cut(image: Image.Image, box: tuple[int, int, int, int], size: int) -> Tensor:
    """A square of the picture, resized: [3, size, size] in -1..1."""
    return _to_tensor(image.resize((size, size), Image.Resampling.BICUBIC, box)).movedim(-1, 0) * 2 - 1


def on_colour(pixels: Tensor, mask: Tensor, colour: Tensor) -> Tensor:
    """The subject alone on a square of one colour: [H, W, 3] in 0..1, mask [H, W] -> [side, side, 3]."""
    rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
    top, left = int(rows[0]), int(columns[0])
    cut = mask[top : int(rows[-1]) + 1, left : int(columns[-1]) + 1, None]
    height, width = cut.shape[:2]
    side = max(round(max(height, width) * (1 + 2 * MARGIN)), SMALLEST)
    y, x = (side - height) // 2, (side - width) // 2
    square = colour.expand(side, side, 3).clone()
    square[y : y + height, x : x + width] = torch.lerp(colour, pixels[top:, left:][:height, :width], cut)
    return square


def read_names(root: Path, split: str) -> list[str]:
    path = root / ("image_ids.txt" if split == "all" else f"image_ids_{split}.txt")
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: {root} is not a data set in the layout of FastComposer's FFHQ")
    names = path.read_text().split()
    if not names:
        raise EmptySplit(f"{path} lists no record, so there is nothing to read in the split {split!r}")
    return names


def _to_tensor(image: Image.Image) -> Tensor:
    """[H, W, 3] in 0..1."""
    return torch.from_numpy(np.array(image)).float() / 255
