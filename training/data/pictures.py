"""Picture files as people have them: named anyhow, turned by the camera, of any kind, some broken."""

from __future__ import annotations

import logging
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset

log = logging.getLogger(__name__)

ENDINGS = {".jpg", ".jpeg", ".png", ".webp"}
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, MemoryError, Image.DecompressionBombError)
"""What Pillow raises for files that are damaged, cut short, no pictures, or so large that they look like an attack."""
BEHIND = (255, 255, 255)
"""What is seen through a transparent picture."""


def read_picture(file: Path | BinaryIO) -> Image.Image:
    """A picture as a viewer shows it: upright, in 8 bits of RGB, of an animation the first frame.

    Raises one of UNREADABLE.
    """
    with Image.open(file) as stored:
        picture = ImageOps.exif_transpose(stored)
        if picture.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
            values = np.asarray(picture, np.float64) / 257
            picture = Image.fromarray(values.round().clip(0, 255).astype(np.uint8))
        if picture.has_transparency_data:
            layer = picture.convert("RGBA")
            picture = Image.new("RGBA", layer.size, (*BEHIND, 255))
            picture.alpha_composite(layer)
        return picture.convert("RGB")


class PictureFiles(Dataset):
    """(name, picture) of every file; None for one that cannot be read."""

    def __init__(self, files: dict[str, Path]):
        self.files = list(files.items())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[str, Image.Image | None]:
        name, path = self.files[index]
        try:
            return name, read_picture(path)
        except UNREADABLE as error:
            log.warning("skipping %s: %s: %s", path, type(error).__name__, error)
            return name, None


def find_pictures(folder: Path) -> dict[str, Path]:
    """Every picture in the folder and below, under the name of its record."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)
    if not paths:
        raise ValueError(f"{folder} holds no picture ({', '.join(sorted(ENDINGS))})")
    files: dict[str, Path] = {}
    for path in paths:
        name = record_name(path.relative_to(folder))
        if name in files:
            raise ValueError(f"{path} and {files[name]} would both become record '{name}': rename one of them")
        files[name] = path
    return files


def record_name(path: Path) -> str:
    """Of a picture's path within its folder: one line of text, whatever the file system takes as a name."""
    name = "_".join(path.with_suffix("").parts)
    name = "".join(letter if letter.isprintable() else "_" for letter in name)
    return f"_{name[1:]}" if name.startswith(".") else name
