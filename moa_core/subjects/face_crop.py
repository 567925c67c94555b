"""A face cut out of a picture as insightface cuts it for its own models, turned upright and always of one size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE = 224
POINTS = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))
"""Where eyes, nose and corners of the mouth come to lie (x, y) in a crop of 112 (ArcFace's)."""


def face_crop(picture: Tensor, points: Tensor) -> Tensor:
    """picture [H, W, 3] in 0..1, points [5, 2] (x, y in pixels): eyes, nose, mouth -> [224, 224, 3].

    By the similarity that brings the points closest to where they belong; black where the picture ends.
    """
    there = torch.view_as_complex(torch.tensor(POINTS, dtype=torch.float64) * SIZE / 112)
    here = torch.view_as_complex(points.to("cpu", torch.float64).contiguous())
    own, wanted = here - here.mean(), there - there.mean()
    turned = (own * own.conj()).sum() / (own.conj() * wanted).sum()  # scale and angle, from the crop to the picture
    rows, columns = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    at = (torch.complex(columns.double(), rows.double()) - there.mean()) * turned + here.mean()
    height, width, _ = picture.shape
    grid = torch.stack([at.real * 2 / (width - 1) - 1, at.imag * 2 / (height - 1) - 1], dim=-1)  # [S, S, 2]
    pixels = picture.movedim(-1, 0)[None].float()
    cut = F.grid_sample(pixels, grid[None].to(pixels), mode="bilinear", padding_mode="zeros", align_corners=True)
    return cut[0].movedim(0, -1)
