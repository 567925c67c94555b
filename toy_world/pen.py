"""Drawing in two pictures at once: the colours, and the map of who is visible where."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

GRID = 128  # the side of every picture in scene units, whatever its size in pixels
SUPERSAMPLING = 3


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """From a (share 0) to b (share 1)."""
    return tuple(round(x + (y - x) * share) for x, y in zip(a, b, strict=True))


def arc(cx: float, cy: float, rx: float, ry: float, start: float, end: float, steps: int = 16) -> list[Point]:
    """Points on an ellipse from angle `start` to `end`, in degrees, clockwise from the right."""
    angles = [math.radians(start + (end - start) * i / steps) for i in range(steps + 1)]
    return [(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles]


class Canvas:
    """Both pictures, supersampled: colours [size, size, 3] and segment ids [size, size] (0 = background)."""

    def __init__(self, size: int, background: Colour = (0, 0, 0)):
        side = size * SUPERSAMPLING
        self.scale = side / GRID
        self.image = Image.new("RGB", (side, side), background)
        self.segments = Image.new("L", (side, side), 0)
        self.colours = ImageDraw.Draw(self.image)
        self.ids = ImageDraw.Draw(self.segments)

    def gradient(self, top: Colour, bottom: Colour, y0: float = 0, y1: float = GRID) -> None:
        """A band over the whole width from y0 to y1, in scene units."""
        a, b, width = round(y0 * self.scale), round(y1 * self.scale), self.image.width
        ramp = np.linspace(top, bottom, max(b - a, 1)).astype(np.uint8)[:, None]
        self.image.paste(Image.fromarray(ramp).resize((width, b - a), Image.Resampling.NEAREST), (0, a))

    def finish(self) -> tuple[Image.Image, np.ndarray]:
        """The picture and its map uint8 [size, size]; a pixel belongs to whom its centre shows."""
        middle = SUPERSAMPLING // 2
        ids = np.asarray(self.segments)[middle::SUPERSAMPLING, middle::SUPERSAMPLING]
        return self.image.reduce(SUPERSAMPLING), np.ascontiguousarray(ids)


class Pen:
    """Draws shapes in a frame of its own: origin (x, y) and unit in scene units, mirrored if `mirror` is -1.

    What it draws belongs to `segment`: a person's number, 0 for what covers a person and is nobody, or None
    for the background behind all people, where the map need not be touched.
    """

    def __init__(
        self,
        canvas: Canvas,
        x: float = 0,
        y: float = 0,
        unit: float = 1,
        mirror: int = 1,
        segment: int | None = None,
    ):
        self.canvas, self.mirror, self.segment = canvas, mirror, segment
        self.x, self.y, self.unit = x, y, unit

    def _place(self, points: list[Point]) -> list[Point]:
        """From this frame to canvas pixels."""
        scale, x0, y0 = self.canvas.scale, self.x, self.y
        across, down = self.mirror * self.unit * scale, self.unit * scale
        x0, y0 = x0 * scale, y0 * scale
        return [(x0 + x * across, y0 + y * down) for x, y in points]

    def _length(self, length: float) -> float:
        return length * self.unit * self.canvas.scale

    def _inks(self, colour: Colour):
        """Each of the two pictures with what to draw into it."""
        yield self.canvas.colours, colour
        if self.segment is not None:
            yield self.canvas.ids, self.segment

    def at(self, x: float, y: float, unit: float = 1) -> Pen:
        """The same pen in a frame moved to (x, y) and scaled by `unit`."""
        x, y = self.x + self.mirror * x * self.unit, self.y + y * self.unit
        return Pen(self.canvas, x, y, self.unit * unit, self.mirror, self.segment)

    def nobody(self) -> Pen:
        """The same pen for what covers a person and is not part of one."""
        return Pen(self.canvas, self.x, self.y, self.unit, self.mirror, segment=0)

    def polygon(self, points: list[Point], fill: Colour) -> None:
        path = self._place(points)
        for draw, ink in self._inks(fill):
            draw.polygon(path, ink)

    def ellipse(self, cx: float, cy: float, rx: float, ry: float, fill: Colour) -> None:
        ((x, y),), rx, ry = self._place([(cx, cy)]), self._length(rx), self._length(ry)
        for draw, ink in self._inks(fill):
            draw.ellipse((x - rx, y - ry, x + rx, y + ry), ink)

    def circle(self, cx: float, cy: float, r: float, fill: Colour) -> None:
        self.ellipse(cx, cy, r, r, fill)

    def ring(self, cx: float, cy: float, r: float, width: float, colour: Colour) -> None:
        """A circle line of outer radius r."""
        ((x, y),), r, width = self._place([(cx, cy)]), self._length(r), max(1, round(self._length(width)))
        for draw, ink in self._inks(colour):
            draw.ellipse((x - r, y - r, x + r, y + r), outline=ink, width=width)

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: Colour, radius: float = 0) -> None:
        """A rectangle, with rounded corners if it has a radius."""
        (ax, ay), (bx, by) = self._place([(x0, y0), (x1, y1)])
        edges = (min(ax, bx), ay, max(ax, bx), by)
        for draw, ink in self._inks(fill):
            if radius:
                draw.rounded_rectangle(edges, self._length(radius), ink)
            else:
                draw.rectangle(edges, ink)

    def line(self, points: list[Point], width: float, colour: Colour) -> None:
        """A stroke with round ends and joints."""
        path, width = self._place(points), self._length(width)
        r = width / 2
        for draw, ink in self._inks(colour):
            draw.line(path, ink, max(1, round(width)))
            if width > 3:
                for x, y in path:
                    draw.ellipse((x - r, y - r, x + r, y + r), ink)
