"""Scouting in ComfyUI: a few coarse steps by the prior alone show where the words will be."""

from __future__ import annotations

import comfy.samplers
import torch

from ...moa_core.routing.word_router import scouting_timesteps
from ...moa_core.run import Run


def scout(moa: Run, executor, noise, latent_image, sigmas, denoise_mask, callback, seed, **kwargs):
    """A few coarse steps by the prior alone, from the run's own start; nobody but the callback hears of them."""
    guider = executor.class_obj
    sampling = guider.model_patcher.get_model_object("model_sampling")
    later = [
        float(sampling.sigma(torch.tensor(t))) for t in scouting_timesteps(float(sampling.timestep(sigmas[0])))[1:]
    ]
    coarse = torch.tensor([float(sigmas[0]), *later], dtype=sigmas.dtype, device=sigmas.device)
    if not bool((coarse[:-1] > coarse[1:]).all()):
        return  # too short a run to look ahead in
    conds = {name: [dict(c) for c in conds] for name, conds in guider.conds.items()}
    moa.scouting = True
    try:
        euler = comfy.samplers.ksampler("euler")
        executor(noise, latent_image, euler, coarse, denoise_mask, callback, True, seed, **kwargs)
    finally:
        moa.scouting = False
        guider.conds = conds
    moa.router.finish()
