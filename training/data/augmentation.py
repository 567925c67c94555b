"""References varied as FastComposer varies them, so that a subject is more than one picture of it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from training.config import Augmentation

WAYS = {
    "rotation": v2.RandomAffine(30, interpolation=v2.InterpolationMode.BILINEAR),
    "jitter": v2.ColorJitter(0.5, 0.5, 0.5, 0.5),
    "blur": v2.GaussianBlur(5, (0.1, 2.0)),
    "grey": v2.Grayscale(3),
    "flip": v2.RandomHorizontalFlip(1.0),
    "elastic": v2.ElasticTransform(),
}
"""In FastComposer's order; zoom comes before the picture is a square (preparation.py)."""


def augmented(picture: Tensor, chances: Augmentation, rng: np.random.Generator) -> Tensor:
    """A square [S, S, 3] in 0..1, varied in each of the ways by its chance; all randomness is the generator's."""
    pixels = picture.movedim(-1, 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**63)))
        for name, way in WAYS.items():
            if rng.random() < getattr(chances, name):
                pixels = way(pixels)
    return pixels.clamp(0.0, 1.0).movedim(0, -1)
