"""Picture files as people have them: named anyhow, turned by the camera, of any kind, some broken."""

from __future__ import annotations

import logging
import struct
from collections import Counter
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from moa_core.subjects.reference import SMALLEST
from training.data.processes import processes

log = logging.getLogger(__name__)

ENDINGS = {".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
UNREADABLE = (
    OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error, MemoryError, Image.DecompressionBombError,
)  # fmt: skip
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
        if picture.mode == "F":
            raise ValueError("its pixels are numbers without a known white")
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
            picture = read_picture(path)
        except UNREADABLE as error:
            log.warning("skipping %s: %s: %s", path, type(error).__name__, error)
            return name, None
        if min(picture.size) < SMALLEST:
            log.warning("skipping %s: %dx%d pixels, fewer than %d a side", path, *picture.size, SMALLEST)
            return name, None
        return name, picture


def find_pictures(folder: Path) -> dict[str, Path]:
    """Every picture in the folder and below, under the name of its record. Says what else is there."""
    there = sorted(path for path in folder.rglob("*") if path.is_file())
    paths = [path for path in there if path.suffix.lower() in ENDINGS]
    others = Counter(path.suffix.lower() or path.name for path in there if path.suffix.lower() not in ENDINGS)
    if others and processes().is_main_process:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(5))
        log.warning("%s also holds %d files that are left out: %s", folder, sum(others.values()), kinds)
    if not paths:
        raise ValueError(f"{folder} holds no picture ({', '.join(sorted(ENDINGS))})")
    files: dict[str, Path] = {}
    for path in paths:
        name = record_name(path.relative_to(folder))
        if name in files:  # IMG_1.jpg and IMG_1.png
            name += path.suffix.lower().replace(".", "_")
        if name in files:
            raise ValueError(f"{path} and {files[name]} would both become record '{name}': rename one of them")
        files[name] = path
    return files


def record_name(path: Path) -> str:
    """Of a picture's path within its folder: one line of text, whatever the file system takes as a name.

    Its first five characters name a folder (layout.py), and Windows drops a blank or a dot at a folder's end.
    """
    name = "_".join(path.with_suffix("").parts)
    name = "".join(letter if letter.isprintable() else "_" for letter in name)
    name = f"_{name[1:]}" if name.startswith(".") else name
    folder, rest = name[:5], name[5:]
    return f"{folder[:-1]}_{rest}" if folder.endswith((" ", ".")) else name
