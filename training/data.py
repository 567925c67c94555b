"""The one reader for the layout in which FastComposer published FFHQ; `training.toy.dataset` writes it too.

image_ids.txt, image_ids_train.txt, image_ids_test.txt; per picture, in a folder named after the first five
characters of its id: <id>.jpg, <id>.json (caption; segments with id, bbox, coco_label and the start and end
of their noun phrase) and <id>.npy (map of segment ids, 0 = background).

The published boxes are named [h1, w1, h2, w2] and hold columns under h and rows under w. The map says the
same thing without that trap and to the pixel, so boxes are taken from the map.
"""

from __future__ import annotations

import json
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

log = logging.getLogger(__name__)

HANDFUL = 5
"""So many broken records never stop a training; beyond, not more than BROKEN_SHARE may be broken."""
BROKEN_SHARE = 0.01
ENOUGH_READ = 1000
"""The share is taken of at least so many records (or of all), for it says little about fewer."""

Background = Literal["neutral", "random"]


class BrokenRecord(Exception):
    """A file of a record is not what the layout promises."""

    def __init__(self, file: Path, expected: str, found: str):
        super().__init__(f"{file}: expected {expected}, found {found}")
        self.file, self.expected, self.found = file, expected, found


class EmptySplit(ValueError):
    """A split of the data set lists no record."""


class TooManyBroken(RuntimeError):
    """So many records are broken that something is wrong with the data set."""


@dataclass(frozen=True)
class Segment:
    """One subject: its number in the map, and the characters [start, end) of its noun phrase."""

    id: int
    start: int
    end: int


@dataclass(frozen=True)
class Record:
    """One picture as stored. ids: [H, W], which segment each pixel shows."""

    id: str
    image: Image.Image
    caption: str
    segments: list[Segment]
    ids: np.ndarray


def read_record(root: Path, name: str, label: str = "person") -> Record:
    """Reads and checks one record, keeping the segments with this coco_label. Raises BrokenRecord."""
    stem = Path(root) / name[:5] / name
    image = _read_image(stem.with_suffix(".jpg"))
    caption, segments = _read_caption(stem.with_suffix(".json"), label)
    ids = _read_map(stem.with_suffix(".npy"), image.size)
    for segment in segments:
        if not (ids == segment.id).any():
            raise BrokenRecord(stem.with_suffix(".npy"), f"pixels of segment {segment.id}", "none")
    return Record(name, image, caption, segments, ids)


def _read_image(path: Path) -> Image.Image:
    try:
        image = Image.open(path).convert("RGB")
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for some broken headers
        raise BrokenRecord(path, "a picture", _why(error)) from error
    if min(image.size) < SMALLEST:
        raise BrokenRecord(path, f"at least {SMALLEST}x{SMALLEST} pixels", "{}x{}".format(*image.size))
    return image


def _read_caption(path: Path, label: str) -> tuple[str, list[Segment]]:
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BrokenRecord(path, "JSON", _why(error)) from error
    if not isinstance(info, dict) or not isinstance(info.get("caption"), str):
        raise BrokenRecord(path, "an object with a text under `caption`", _short(info))
    if not isinstance(info.get("segments"), list):
        raise BrokenRecord(path, "a list under `segments`", _short(info.get("segments")))
    caption, segments = info["caption"], []
    for entry in info["segments"]:
        numbers = [entry.get(key) for key in ("id", "start", "end")] if isinstance(entry, dict) else [None]
        if any(type(number) is not int for number in numbers):
            raise BrokenRecord(path, "segments with whole numbers id, start and end", _short(entry))
        segment = Segment(*numbers)
        if not 0 <= segment.start < segment.end <= len(caption):
            span = f"{segment.start} to {segment.end} of {len(caption)}"
            raise BrokenRecord(path, f"segment {segment.id} to name characters of the caption", span)
        if entry.get("coco_label", label) == label:
            segments.append(segment)
    return caption, segments


def _read_map(path: Path, size: tuple[int, int]) -> np.ndarray:
    try:
        ids = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise BrokenRecord(path, "a map of segment ids", _why(error)) from error
    expected = (size[1], size[0])
    if not isinstance(ids, np.ndarray) or ids.shape != expected or ids.dtype.kind not in "iu":
        found = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, np.ndarray) else type(ids).__name__
        raise BrokenRecord(path, f"whole numbers {list(expected)} as the picture has pixels", found)
    return ids


def _why(error: Exception) -> str:
    return "no such file" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class SubjectDataset(Dataset):
    """Pictures with their subjects, ready to train on.

    An item, with S = max_subjects, H = W = size and R = reference_size:
      id, caption   text
      picture       [3, H, W] in -1..1
      references    [S, 3, R, R], each subject's picture as the image encoder takes it
      masks         [S, H, W], 1 where the subject is visible, 0 elsewhere
      positions     [S], the character of the caption before which the subject's noun phrase ends (its `end`)
      valid         [S] bool; the entries of the other tensors are 0 where it is False

    With `augment`, a random square of the picture is taken, its side between `smallest_crop` and 1 times the
    shorter side; without it, the largest square in the middle. Subjects that then cover less than `min_area`
    of the square are left out, and of more than S the largest are kept, in the caption's order. The
    references come from the whole picture; what is not the subject becomes the neutral colour of the image
    encoder, or a random one. Everything follows from (seed, epoch, index).

    A broken record is replaced by the next one, named in the log and kept in `broken`. Raises TooManyBroken
    when that is more than a few.
    """

    def __init__(
        self,
        root: str | Path,
        split: Literal["train", "test", "all"] = "train",
        size: int = 128,
        reference_size: int = 64,
        max_subjects: int = 4,
        seed: int = 0,
        augment: bool = True,
        smallest_crop: float = 1.0,
        min_area: float = 0.01,
        reference_background: Background = "neutral",
    ):
        self.root, self.size, self.reference_size = Path(root), size, reference_size
        self.max_subjects, self.seed, self.augment = max_subjects, seed, augment
        self.smallest_crop, self.min_area = smallest_crop, min_area
        self.reference_background = reference_background
        self.names = _read_names(self.root, split)
        self.broken: dict[str, BrokenRecord] = {}
        self._reads = 0

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor | str]:
        """The record `index` in the first epoch, or `(epoch, index)`: other crops for another epoch."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        rng = np.random.default_rng([self.seed, epoch, index])
        return self._prepare(self._next_whole_record(index), rng)

    def _next_whole_record(self, index: int) -> Record:
        for step in range(len(self)):
            name = self.names[(index + step) % len(self)]
            if name in self.broken:
                continue
            self._reads += 1
            try:
                return read_record(self.root, name)
            except BrokenRecord as error:
                self.broken[name] = error
                log.warning("skipping a broken record: %s", error)
                self._stop_if_too_many()
        raise TooManyBroken(f"none of the {len(self)} records in {self.root} is whole; look at the log above")

    def _stop_if_too_many(self) -> None:
        broken, of = len(self.broken), max(self._reads, min(len(self), ENOUGH_READ))
        if broken > max(HANDFUL, BROKEN_SHARE * of):
            last = list(self.broken.values())[-1]
            raise TooManyBroken(
                f"{broken} of the {self._reads} records read from {self.root} are broken, more than "
                f"{BROKEN_SHARE:.0%}: the data set seems damaged; repair it or fetch it again. Last: {last}"
            )

    def _prepare(self, record: Record, rng: np.random.Generator) -> dict[str, Tensor | str]:
        box = self._crop(record.image.size, rng)
        square = (self.size, self.size)
        picture = record.image.resize(square, Image.Resampling.BICUBIC, box)
        # Nearest keeps ids whole; taken in the same box as the picture, so both stay aligned.
        ids = Image.fromarray(record.ids.astype(np.int32)).resize(square, Image.Resampling.NEAREST, box)
        masks = [torch.from_numpy(np.asarray(ids) == segment.id) for segment in record.segments]
        kept = self._keep(masks, record.segments)

        s, r = self.max_subjects, self.reference_size
        item = {
            "id": record.id,
            "caption": record.caption,
            "picture": _to_tensor(picture).movedim(-1, 0) * 2 - 1,
            "references": torch.zeros(s, 3, r, r),
            "masks": torch.zeros(s, self.size, self.size),
            "positions": torch.zeros(s, dtype=torch.long),
            "valid": torch.zeros(s, dtype=torch.bool),
        }
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
        width, height = size
        side = min(size)
        left, top = (width - side) // 2, (height - side) // 2
        if self.augment:
            side = round(side * rng.uniform(self.smallest_crop, 1))
            left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
        return left, top, left + side, top + side

    def _keep(self, masks: list[Tensor], segments: list[Segment]) -> list[int]:
        """The numbers of the segments large enough to learn from, in the caption's order."""
        areas = [float(mask.float().mean()) for mask in masks]
        kept = [n for n, area in enumerate(areas) if area >= self.min_area]
        kept = sorted(kept, key=lambda n: -areas[n])[: self.max_subjects]
        return sorted(kept, key=lambda n: segments[n].end)


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


def _read_names(root: Path, split: str) -> list[str]:
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
