"""Five points of a face as InstantID draws them for its ControlNet: discs on black, each tied to the nose."""

from __future__ import annotations

import torch
from torch import Tensor

SIDE = 1280
"""Pixels of the longer side of a drawing: that of the pictures in which InstantID draws."""
RADIUS, WIDTH, DIM = 10.0, 8.0, 0.6
"""Of a disc, and of the middle of a tie, in pixels; and how bright a tie is."""
COLORS = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1))
"""Of the eyes, the nose, the corners of the mouth, in insightface's order; a tie to the nose has that of its end."""
NOSE = 2


def draw_face_points(points: Tensor, size: tuple[int, int]) -> Tensor:
    """points [5, 2] (x, y in pixels) of a face in a picture of a size (height, width) -> [h, w, 3] in 0..1."""
    scale = SIDE / max(size)
    height, width = (round(side * scale) for side in size)
    places = torch.view_as_complex((points.to("cpu", torch.float32) * scale).contiguous())  # [5]
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    here = torch.complex(columns.float(), rows.float())  # [h, w]
    picture, colors = torch.zeros(height, width, 3), torch.tensor(COLORS, dtype=torch.float32)
    for place, color in zip(places, colors, strict=True):
        middle, half = (place + places[NOSE]) / 2, (place - places[NOSE]) / 2
        off = (here - middle) * half.conj() / half.abs()  # along the tie, and across it; NaN at the nose itself
        picture[(off.real / half.abs()) ** 2 + (off.imag / (WIDTH / 2)) ** 2 <= 1] = DIM * color
    for place, color in zip(places, colors, strict=True):
        picture[(here - place).abs() <= RADIUS] = color
    return picture
