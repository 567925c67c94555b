"""What a patched MODEL does around one U-Net call of a sampling run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..moa_core.adapters.run import ImageCall, ImageRun
from ..moa_core.learned.run import LearnedRun
from ..moa_core.learned.unet_call import UNetCall
from ..moa_core.routing.trace import Trace
from ..moa_core.subjects.subject import Subject
from .bound_rows import MODEL_COND, Rows
from .host_layers import host_attend, host_prior, with_patches


@dataclass
class SamplingRun:
    """One sampling run under way."""

    start_sigma: float
    end_sigma: float
    trace: Trace
    moa: LearnedRun | ImageRun
    spans: list[tuple[float, float, list[Subject]]]
    """(from, to) in sigma of every positive prompt, and its subjects."""

    def present(self, sigma: float) -> set[Subject]:
        """The subjects of the prompts at work at this noise level."""
        return {subject for start, end, there in self.spans if end <= sigma <= start for subject in there}

    @torch.compiler.disable
    def call_unet(self, executor, x, timesteps, context, y=None, control=None, transformer_options={}, **kwargs):  # noqa: B006
        """One U-Net call: x [B, 4, h, w], timesteps [B], context [B, T, D].

        Not compiled: a compiled U-Net is the same for every step, what MoA does is not. And as ComfyUI has
        torch.compile trust that transformer_options never change, it would leave our patches out, or take one layer's
        for another's.
        """
        rows: Rows = kwargs.pop(MODEL_COND)
        sigma = float(transformer_options["sigmas"][0])
        if not self.end_sigma <= sigma <= self.start_sigma:
            return executor(x, timesteps, context, y, control, transformer_options, **kwargs)
        timestep = float(timesteps[0])  # before the U-Net is queued: afterwards it would wait for it

        options = dict(transformer_options)
        prior = host_prior(executor.class_obj)
        call = self.moa.call(rows.rows, sigma, x, context, timesteps, prior, host_attend(options), self.present(sigma))
        options["patches"] = with_patches(options.get("patches", {}), call)
        out = executor(x, timesteps, context, y, control, options, **kwargs)
        if tuple(x.shape[-2:]) == self.trace.latent_shape:  # whole pictures, no areas of them
            record(self.trace, timestep, rows, len(transformer_options["cond_or_uncond"]), call)
        self.moa.finish(call, rows.rows, x)
        return out


def record(trace: Trace, timestep: float, rows: Rows, prompts: int, call: UNetCall | ImageCall) -> None:
    """Keep the shares of the rows under positive prompts; each prompt of a call has the same pictures."""
    pictures = len(rows.rows) // prompts
    for start in range(0, len(rows.rows), pictures):
        block = rows.rows[start : start + pictures]
        if block[0].positive:
            maps = {layer: share[start : start + pictures] for layer, share in call.shares.items()}
            trace.add(timestep, maps, [row.view.picture for row in block])
