"""Stable Diffusion's noise schedule."""

from __future__ import annotations

import torch
from torch import Tensor

TIMESTEPS = 1000
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "prediction_type": "epsilon"}
"""As arguments of diffusers' schedulers."""


def kept_variance() -> Tensor:
    """[1000]: the share of the picture's variance that is left at each timestep."""
    betas = torch.linspace(SCHEDULE["beta_start"] ** 0.5, SCHEDULE["beta_end"] ** 0.5, TIMESTEPS) ** 2
    return (1 - betas).cumprod(dim=0)


def min_snr(timestep: Tensor, gamma: float) -> Tensor:
    """Min-SNR weights [B] of errors in the noise (Hang et al., 2023): low noise, SNR above gamma, counts for less."""
    kept = kept_variance().to(timestep.device)[timestep]
    return (gamma * (1 - kept) / kept).clamp(max=1.0)


def add_noise(latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """latents and noise [B, 4, h, w], timestep [B] -> what the U-Net gets to see, [B, 4, h, w]."""
    kept = kept_variance().to(latents.device)[timestep][:, None, None, None]
    return kept.sqrt() * latents + (1 - kept).sqrt() * noise


def sigma_at(timestep: int) -> float:
    """The noise level of a timestep, as a ratio of noise to picture."""
    kept = float(kept_variance()[timestep])
    return ((1 - kept) / kept) ** 0.5
