"""What a patched MODEL does around one U-Net call of a sampling run."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from comfy.model_patcher import ModelPatcher

from ..moa_core.routing.trace import Trace
from ..moa_core.run import Call, Run
from ..moa_core.subjects.subject import Subject
from .bound_rows import MODEL_COND, Rows
from .host_layers import cast_to, host_attend, host_prior, patched_options


@dataclass
class SamplingRun:
    """One sampling run under way."""

    start_sigma: float
    end_sigma: float
    trace: Trace
    moa: Run
    spans: list[tuple[float, float, list[Subject]]]
    """(from, to) in sigma of every positive prompt, and its subjects."""
    model: ModelPatcher
    call: Call | None = None
    """The U-Net call that is being made, where MoA is at work in it."""
    dtype: torch.dtype | None = None
    """What the U-Net computes in, as its first call shows."""

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
        if not self.moa.scouting and not self.end_sigma <= sigma <= self.start_sigma:
            return executor(x, timesteps, context, y, control, transformer_options, **kwargs)
        timestep = float(timesteps[0])  # before the U-Net is queued: afterwards it would wait for it
        if self.dtype is None and self.moa.learned is not None:
            self.dtype = x.dtype
            cast_to(x.dtype, self.moa.learned.mixture)
        prior, attend = host_prior(executor.class_obj), host_attend(transformer_options)
        call = self.moa.call(
            rows.rows, sigma, x, context, timesteps, prior, attend, self.present(sigma), self._hooked_weights()
        )
        options = patched_options(transformer_options, call)
        try:
            self.call = call
            out = executor(x, timesteps, context, y, control, options, **kwargs)
        finally:
            self.call = None
        if tuple(x.shape[-2:]) == self.trace.latent_shape:  # whole pictures, no areas of them
            record(self.trace, timestep, rows, len(transformer_options["cond_or_uncond"]), call)
        self.moa.finish(call, rows.rows, x)
        return out

    def _hooked_weights(self) -> Hashable:
        """What LoRA hooks with schedules make of the model's weights just now."""
        hooks = self.model.model.current_patcher.current_hooks
        return hooks and tuple((id(hook.hook_ref), hook.strength) for hook in hooks.hooks)


def record(trace: Trace, timestep: float, rows: Rows, prompts: int, call: Call) -> None:
    """Keep the shares of the rows under positive prompts; each prompt of a call has the same pictures."""
    pictures = len(rows.rows) // prompts
    for start in range(0, len(rows.rows), pictures):
        block = rows.rows[start : start + pictures]
        if block[0].positive:
            maps = {layer: share[start : start + pictures] for layer, share in call.shares.items()}
            trace.add(timestep, maps, [row.view.picture for row in block])
