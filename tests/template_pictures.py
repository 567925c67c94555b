"""`python -m tests.template_pictures [name ...]`: the thumbnails of the workflows, drawn anew in a real ComfyUI.

To be run when the toy models or a workflow have changed. Needs ComfyUI.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from training.comfyui import Server, find_comfyui, make_base_directory
from training.comfyui.templates import ENDING, FOLDER, NAMES, NEEDS_FILES, saved_by

SIDE, GAP = 384, 2
BANDS = {"Face shapes", "Swap one of two", "Exchange two people", "Two LoRAs, two people"}
"""Cut out as broad bands: two people, or how broad one is. Others are strips."""
BESIDE = {"Two LoRAs, two people": ["Both LoRAs loaded", "As LoRA subjects"]}
"""Titles, where not all pictures are shown: three bands would cut heads off."""
SAID = {
    "Your photo, your checkpoint": "an IP-Adapter in SD 1.5,\nrouted by words",
    "Two photos, your checkpoint": "an IP-Adapter in SD 1.5,\ntwo people, one word each",
    "Your photo, your SDXL checkpoint": "an IP-Adapter in SDXL,\nrouted by words",
    "Your LoRAs, your checkpoint": "two LoRAs in SD 1.5\nor SDXL, one word each",
}
"""Of workflows that nobody has run yet."""
FRAMES = (0, 3, 7)
"""Of an animation."""


def main(names: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder, Server(find_comfyui(), make_base_directory(Path(folder))) as server:
        for name in names or NAMES:
            path = FOLDER / f"{name}{ENDING}.jpg"
            picture = card(name) if name in NEEDS_FILES else thumbnail(name, painted(name, server))
            picture.save(path, quality=85)
            print(f"{path.name}: {path.stat().st_size:,} bytes", flush=True)


def painted(name: str, server: Server) -> list[Image.Image]:
    """The pictures that a workflow saves; or some frames of its animation."""
    saved = saved_by(name, server)
    if "Animation" in saved:
        return [saved["Animation"][n] for n in FRAMES]
    return [picture for title in BESIDE.get(name, saved) for picture in saved[title]]


def thumbnail(name: str, pictures: list[Image.Image]) -> Image.Image:
    """One picture whole, four in two rows, others cut to strips beside or bands above each other."""
    count = len(pictures)
    columns, rows = (2, 2) if count == 4 else (1, count) if name in BANDS else (count, 1)
    canvas = Image.new("RGB", (SIDE, SIDE), "white")
    width, height = ((SIDE + GAP) // columns - GAP, (SIDE + GAP) // rows - GAP)
    for n, picture in enumerate(pictures):
        x, y = n % columns * (width + GAP), n // columns * (height + GAP)
        canvas.paste(_cut(picture, width, height), (x, y))
    return canvas


def card(name: str) -> Image.Image:
    """For a workflow that nobody has run yet: no picture, but what it is."""
    canvas = Image.new("RGB", (SIDE, SIDE), (53, 85, 53))
    title = name.replace(", ", ",\n")
    ImageDraw.Draw(canvas).text((28, 60), title, "white", ImageFont.load_default(34), spacing=12)
    said = f"{SAID[name]}\n\nnever run on real weights"
    ImageDraw.Draw(canvas).text((28, 210), said, (200, 220, 200), ImageFont.load_default(22), spacing=8)
    return canvas


def _cut(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The middle of a picture, as large as fits, in that size."""
    side = max(width, height)
    large = picture.resize((side, side), Image.Resampling.LANCZOS)
    left, top = (side - width) // 2, (side - height) // 2
    return large.crop((left, top, left + width, top + height))


if __name__ == "__main__":
    main(sys.argv[1:])
