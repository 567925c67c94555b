"""One record of the layout in which FastComposer published FFHQ, read and checked.

Per picture: <id>.jpg, <id>.json (caption; segments with id, bbox, coco_label and the start and end of their
noun phrase) and <id>.npy (map of segment ids, 0 = background).

The published boxes are named [h1, w1, h2, w2] and hold columns under h and rows under w. The map says the
same thing without that trap and to the pixel, so boxes are taken from the map.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from moa_core.reference import SMALLEST

Open = Callable[[Path], BinaryIO]
"""Opens one of a record's files; raises FileNotFoundError where it is missing."""


def open_file(path: Path) -> BinaryIO:
    return path.open("rb")


class BrokenRecord(Exception):
    """A file of a record is not what the layout promises."""

    def __init__(self, file: Path, expected: str, found: str):
        super().__init__(f"{file}: expected {expected}, found {found}")
        self.file, self.expected, self.found = file, expected, found


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


def read_record(folder: Path, name: str, label: str = "person", open: Open = open_file) -> Record:
    """Reads and checks one record, keeping the segments with this coco_label. Raises BrokenRecord."""
    image = _read_image(folder / f"{name}.jpg", open)
    caption, segments = _read_caption(folder / f"{name}.json", open, label)
    ids = _read_map(folder / f"{name}.npy", open, image.size)
    for segment in segments:
        if not (ids == segment.id).any():
            raise BrokenRecord(folder / f"{name}.npy", f"pixels of segment {segment.id}", "none")
    return Record(name, image, caption, segments, ids)


def _read_image(path: Path, open: Open) -> Image.Image:
    try:
        with open(path) as file:
            image = Image.open(file).convert("RGB")
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for some broken headers
        raise BrokenRecord(path, "a picture", _why(error)) from error
    if min(image.size) < SMALLEST:
        raise BrokenRecord(path, f"at least {SMALLEST}x{SMALLEST} pixels", "{}x{}".format(*image.size))
    return image


def _read_caption(path: Path, open: Open, label: str) -> tuple[str, list[Segment]]:
    try:
        with open(path) as file:
            info = json.load(file)
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


def _read_map(path: Path, open: Open, size: tuple[int, int]) -> np.ndarray:
    try:
        with open(path) as file:
            ids = np.load(file, allow_pickle=False)
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
