"""One record of the layout in which FastComposer published FFHQ, read and checked.

Per picture: <id>.jpg, <id>.json (caption; segments with id, bbox, coco_label and the start and end of their
noun phrase) and <id>.npy (map of segment ids, 0 = background). Ours beside them, where latents are cached
(latents.py): <id>.latents.safetensors.

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
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from moa_core.subjects.reference import SMALLEST
from training.data.pictures import UNREADABLE, read_picture

LATENTS = "latents.safetensors"
"""Ending of a record's cached latents."""

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
    """One picture as stored.

    ids: [H, W], which segment each pixel shows. moments: [2, 4, h, w] of its latents, where they were asked for.
    """

    id: str
    image: Image.Image
    caption: str
    segments: list[Segment]
    ids: np.ndarray
    moments: Tensor | None = None


def read_record(
    folder: Path, name: str, label: str = "person", open: Open = open_file, latents: int | None = None
) -> Record:
    """Reads and checks one record, keeping the segments with this coco_label. Raises BrokenRecord.

    latents: the size whose cached latents it must have; None leaves them alone.
    """
    image = read_image(folder / f"{name}.jpg", open)
    caption, segments = _read_caption(folder / f"{name}.json", open, label)
    ids = _read_map(folder / f"{name}.npy", open, image.size)
    for segment in segments:
        if not (ids == segment.id).any():
            raise BrokenRecord(folder / f"{name}.npy", f"pixels of segment {segment.id}", "none")
    moments = read_moments(folder / f"{name}.{LATENTS}", latents, open) if latents else None
    return Record(name, image, caption, segments, ids, moments)


def read_image(path: Path, open: Open = open_file) -> Image.Image:
    """A record's picture. Raises BrokenRecord."""
    try:
        with open(path) as file:
            image = read_picture(file)
    except UNREADABLE as error:
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


def read_moments(path: Path, size: int, open: Open = open_file) -> Tensor:
    """Mean and standard deviation of a record's latents at this picture size, [2, 4, h, w]. Raises BrokenRecord."""
    shape = [2, 4, size // 8, size // 8]
    expected = f"latents for data.size {size}, which python -m training.latents writes"
    try:
        with open(path) as file:
            stored = load(file.read())
        moments = torch.stack([stored["mean"], stored["std"]]).float()
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise BrokenRecord(path, expected, _why(error)) from error
    if list(moments.shape) != shape:
        raise BrokenRecord(path, expected, f"mean and std {list(moments.shape[1:])} instead of {shape[1:]}")
    return moments


def _why(error: Exception) -> str:
    return "no such file" if isinstance(error, FileNotFoundError) else f"{type(error).__name__}: {error}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
