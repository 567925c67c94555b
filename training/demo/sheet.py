"""The demo's sheet: references, the same seed without and with each of them, two people, a morph, the routers' maps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from training.demo.painters import Painter
from training.demo.takes import ALONE, MORPH, PRIOR, TOGETHER, WITH_A, WITH_B, A, B, W

SIDE = 300
"""Width in pixels of a picture of an application."""


def draw_demo(painter: Painter) -> Image.Image:
    """References, the same seed without and with each of them, two people, a morph, the routers' maps."""
    alone = [painter.paint(take) for take in (PRIOR, WITH_A, WITH_B)]
    together = painter.paint(TOGETHER)
    morph, _ = painter.paint(MORPH)
    references = {"subject A": A, "subject B": B, "subject C": W}
    rows = [
        [(name, who.picture()[0]) for name, who in references.items()],
        [(name, _image(pixels)) for name, (pixels, _) in zip(("prior", "with A", "with B"), alone, strict=True)],
        [("A and C", _image(together[0])), *((f"A to B, {n + 1}", Image.fromarray(p)) for n, p in enumerate(morph))],
        [("routers: with A", alone[1][1]), ("routers: A and C", together[1])],
    ]
    first = [*rows[0], *rows[1]]
    titles = [f'"{ALONE[0]}", the same seed', f'"{TOGETHER.prompt}"; the picture above, from A to B', ""]
    return paste_rows(titles, [first, rows[2], rows[3]])


def draw_application(name: str, shown: dict[str, list[Image.Image]]) -> Image.Image:
    """One row: the pictures of an application under their titles."""
    row = [
        (f"{title}, {n}" if len(pictures) > 1 else title, picture)
        for title, pictures in shown.items()
        for n, picture in enumerate(pictures, start=1)
    ]
    return paste_rows([name], [row], width=SIDE * len(row))


def _image(pixels: Sequence[np.ndarray]) -> Image.Image:
    return Image.fromarray(pixels[0])


def paste_rows(titles: list[str], rows: list[list[tuple[str, Image.Image]]], width: int = 1600) -> Image.Image:
    """Named pictures in rows of the same width, each row under its title."""
    gap, line = 8, 26
    font, strips = ImageFont.load_default(17), []
    for title, row in zip(titles, rows, strict=True):
        # All of a row get one height, so that together they are as wide as the sheet.
        shapes = [picture.width / picture.height for _, picture in row]
        height = round((width - gap * (len(row) + 1)) / sum(shapes))
        top = line * (2 if title else 1) + 4
        strip = Image.new("RGB", (width, top + height + gap), "white")
        draw = ImageDraw.Draw(strip)
        draw.text((gap, 2), title, "black", font)
        lefts = itertools.accumulate((round(height * shape) + gap for shape in shapes), initial=gap)
        for left, shape, (name, picture) in zip(lefts, shapes, row, strict=False):
            draw.text((left, top - line), name, (90, 90, 90), font)
            side = (round(height * shape), height)
            strip.paste(picture.convert("RGB").resize(side, Image.Resampling.LANCZOS), (left, top))
        strips.append(strip)
    sheet = Image.new("RGB", (width, sum(strip.height for strip in strips)), "white")
    for strip, top in zip(strips, itertools.accumulate((s.height for s in strips), initial=0), strict=False):
        sheet.paste(strip, (0, top))
    return sheet
