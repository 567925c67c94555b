"""The training of the toy base model's autoencoder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from toy_world.shape import IMAGE_SIZE
from training.finetune.contact_sheet import sheet
from training.host.narrow_vae import LATENT_CHANNELS, NarrowVAE
from training.toy.pretrain.loop import Plan, Trainee, base_of, device, train
from training.toy.pretrain.scenes import RenderedScenes, rendered
from training.toy.renders import to_tensor

FARTHEST = 2.5
"""Latents are kept within this: the decoder squeezes what it reads by 3 * tanh(z / 3)."""
NOISE = 0.05
"""Added to the latents in training: what the U-Net paints is never exact either."""
CROP = 64
HELD_OUT = 64
"""So many pictures at the end of the set are for looking only."""


def vae_loss(vae: NarrowVAE, pictures: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Pictures [B, 3, H, W] in -1..1, noise [B, 4, H / 8, W / 8]: difference, edges, and the latents' shape."""
    latents = vae.encode(pictures)
    restored = vae.decode(latents + NOISE * noise)
    difference = (restored - pictures).abs().mean()
    edges = sum((_slope(restored, axis) - _slope(pictures, axis)).abs().mean() for axis in (2, 3))
    spread, middle = torch.std_mean(latents.float(), dim=(0, 2, 3))
    form = (middle.square() + (spread - 1).square()).mean() + F.relu(latents.abs() - FARTHEST).square().mean()
    return difference + 0.5 * edges + 0.1 * form, {"l1": difference.detach(), "shape": form.detach()}


def _slope(x: Tensor, axis: int) -> Tensor:
    return x.diff(dim=axis)


def psnr(a: Tensor, b: Tensor) -> float:
    """Of pictures in -1..1, in dB."""
    return -10 * float(((a - b) / 2).square().mean().log10())


def crops(pictures: RenderedScenes, count: int, random: torch.Generator) -> Tensor:
    """Random squares [B, 3, CROP, CROP]: the middle, where people are, most often, and the borders often enough."""
    size = pictures.pixels.shape[1]
    index = torch.randint(len(pictures.pixels) - HELD_OUT, (count,), generator=random)
    corner = torch.randint(-8, size - CROP + 9, (count, 2), generator=random).clamp(0, size - CROP)
    squares = [
        pictures.pixels[i, y : y + CROP, x : x + CROP]
        for i, (y, x) in zip(index.tolist(), corner.tolist(), strict=True)
    ]
    return to_tensor(np.stack(squares))


def train_vae(plan: Plan) -> None:
    """Train the autoencoder on squares of rendered scenes."""
    pictures = rendered(plan, IMAGE_SIZE)
    torch.manual_seed(plan.seed)
    vae = base_of(plan).autoencoder.train().requires_grad_(True) if plan.base else NarrowVAE()
    trainee = Trainee("vae", vae, plan)
    shown = to_tensor(pictures.pixels[-HELD_OUT:]).to(device())
    loss = plan.loss(vae_loss)

    def loss_of(random: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        batch = crops(pictures, plan.batch, random)
        noise = torch.randn(plan.batch, LATENT_CHANNELS, CROP // 8, CROP // 8, generator=random)
        return loss(vae, batch.to(device()), noise.to(device()))

    def look(path: Path) -> str:
        latents = vae.encode(shown)
        restored = vae.decode(latents)
        sheet([shown[:8], restored[:8], shown[8:16], restored[8:16]], path)
        spread = ", ".join(f"{s:.2f}" for s in latents.std(dim=(0, 2, 3)).tolist())
        return f"PSNR {psnr(restored, shown):.2f} dB, latents' std {spread}, largest {float(latents.abs().max()):.2f}"

    train(trainee, loss_of, look)
