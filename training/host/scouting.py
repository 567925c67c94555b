"""Scouting in diffusers: a few coarse steps by the prior alone, before a sampling."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from moa_core.routing.word_router import scouting_timesteps
from moa_core.run import Run
from training.host.schedule import sigma_at


def scout(run: Run, predict: Callable[[Tensor, int], Tensor], latents: Tensor, first: int) -> None:
    """Euler's steps from timestep `first` on; latents [B, 4, h, w] of variance sigma^2 + 1 where they are noise.

    predict: what a U-Net is given, of variance 1, and its timestep -> the noise in it, guided; through the run's calls.
    """
    run.scouting = True
    for now, then in pairwise(scouting_timesteps(first)):
        sigma = sigma_at(now)
        latents = latents + (sigma_at(then) - sigma) * predict(latents / (sigma**2 + 1) ** 0.5, now)
    run.scouting = False
    run.router.finish()
