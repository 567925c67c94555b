"""The square round a head, by the points that MediaPipe's face landmarker finds in its face."""

from __future__ import annotations

from torch import Tensor

FOREHEAD, CHIN = 10, 152
"""Numbers of the highest and of the lowest point of an upright face, at the hairline and below the mouth."""
SIDE = 1.7
"""Of the square, in lengths of the face: there is hair above the points, and some neck below them."""
RISE = 0.1
"""How far the square's middle is from that of the points, toward the hair."""


def head_square(points: Tensor, size: tuple[int, int]) -> tuple[int, int, int]:
    """points [478, 2] (x, y in pixels) in a picture of (height, width) -> top, left and side of the square.

    It is no larger than the picture's longer side, and may reach beyond the picture's edges.
    """
    points = points.float()
    first, last = points.amin(dim=0), points.amax(dim=0)
    side = min(round(SIDE * float((last - first).max())), max(size))
    middle = (first + last) / 2 + RISE * (points[FOREHEAD] - points[CHIN])
    left, top = (round(float(place) - side / 2) for place in middle)
    return top, left, side
