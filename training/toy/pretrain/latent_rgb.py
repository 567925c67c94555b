"""The colours of the toy latents, for ComfyUI's preview while sampling (nodes/host/toy_family.py holds them)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from toy_world.draw import draw_scene
from toy_world.shape import IMAGE_SIZE
from toy_world.world import sample_scene
from training.host.pretrained import load_base
from training.toy.renders import to_tensor


def print_latent_rgb(base: Path, scenes: int = 256) -> None:
    """Fit to the autoencoder of a toy checkpoint, on so many scenes."""
    drawn = [draw_scene(sample_scene(np.random.default_rng([0, i])), IMAGE_SIZE)[0] for i in range(scenes)]
    *factors, bias = latent_rgb_factors(load_base(base).autoencoder, to_tensor(np.stack(drawn))).tolist()
    for name, rows in (("latent_rgb_factors", factors), ("latent_rgb_factors_bias", [bias])):
        print(name, *(", ".join(f"{value:.4f}" for value in row) for row in rows), sep="\n    ")


def latent_rgb_factors(autoencoder: nn.Module, pictures: Tensor) -> Tensor:
    """The best linear picture of the latents, by least squares over pictures [B, 3, H, W] in -1..1.

    Returns [4 + 1, 3]: the colour in -1..1 that a unit of each latent channel adds, and last the bias.
    """
    latents = autoencoder.moments(pictures)[0]  # [B, 4, h, w]
    small = F.interpolate(pictures, latents.shape[-2:], mode="area")  # [B, 3, h, w]
    x, y = (t.movedim(1, -1).flatten(0, -2) for t in (latents, small))  # [B * h * w, 4], [B * h * w, 3]
    return torch.linalg.lstsq(F.pad(x, (0, 1), value=1.0), y).solution
