"""Writes the layout of FastComposer's FFHQ that `data.py` reads, every file whole or not at all."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from moa_core.files.whole_file import write_whole


def folder_of(root: Path, name: str) -> Path:
    """Where a record's files lie."""
    return root / name[:5]


def place(root: Path, name: str, ending: str) -> Path:
    """A record's file with this ending (`jpg`)."""
    return folder_of(root, name) / f"{name}.{ending}"


def is_written(root: Path, name: str) -> bool:
    """Whether a record is whole: its .json comes last."""
    return place(root, name, "json").exists()


def write_record(root: Path, name: str, image: Image.Image, ids: np.ndarray, info: dict) -> None:
    """One picture's three files. ids: [H, W], 0 = background; info: caption and segments."""
    folder_of(root, name).mkdir(parents=True, exist_ok=True)
    jpg, npy = io.BytesIO(), io.BytesIO()
    image.save(jpg, "JPEG", quality=95, subsampling=0)
    np.save(npy, ids)
    write_whole(place(root, name, "jpg"), jpg.getvalue())
    write_whole(place(root, name, "npy"), npy.getvalue())
    write_whole(place(root, name, "json"), json.dumps(info).encode())


def write_names(root: Path, everyone: Iterable[str], test: Iterable[str]) -> None:
    """The lists of all records, of those to train on, and of those held out."""
    everyone, test = list(everyone), set(test)
    parts = {
        "image_ids": everyone,
        "image_ids_train": [name for name in everyone if name not in test],
        "image_ids_test": [name for name in everyone if name in test],
    }
    for part, names in parts.items():
        write_whole(root / f"{part}.txt", "".join(f"{name}\n" for name in names).encode())


def bounding_box(mask: np.ndarray) -> list[int]:
    """[h1, w1, h2, w2] as FastComposer's reader takes it: h runs along the columns and w along the rows."""
    rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


class EmptySplit(ValueError):
    """A split of the data set lists no record."""


def read_names(root: Path, split: str) -> list[str]:
    path = root / ("image_ids.txt" if split == "all" else f"image_ids_{split}.txt")
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: {root} is not a data set in the layout of FastComposer's FFHQ")
    names = [line.rstrip("\r") for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    if not names:
        few = ". Of few pictures none is put aside for it: a training draws no test record with run.validate_every: 0"
        raise EmptySplit(
            f"{path} lists no record, so there is nothing to read in the split {split!r}{few * (split == 'test')}"
        )
    return names
