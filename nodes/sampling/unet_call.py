"""What a patched MODEL does around one U-Net call of a sampling run."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from comfy.model_patcher import ModelPatcher

from ...moa_core.address import Layer
from ...moa_core.routing.trace import Trace
from ...moa_core.run import Call, Run
from ...moa_core.subjects.rows import Row
from ...moa_core.subjects.subject import Subject
from ...moa_core.subjects.view import NOWHERE
from ..host.attention_layers import cast_to, host_attend, host_prior, patched_options
from ..host.messages import Message
from .bound_rows import MODEL_COND, CONDPrompt, rows_of
from .other_nodes import PARTS, couples


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
    prompts: Mapping[int, CONDPrompt]
    """Of all the guider's conditionings, by number."""
    foreign: Collection[Layer] = ()
    """The attention layers that are another node's in this run."""
    doubts: list[Message] = field(default_factory=list)
    """What its calls have shown that is to be said of other nodes, each once."""
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
        maps = kwargs.pop(MODEL_COND)
        sigma = float(transformer_options["sigmas"][0])
        if not self.moa.scouting and not self.end_sigma <= sigma <= self.start_sigma:
            return executor(x, timesteps, context, y, control, transformer_options, **kwargs)
        timestep = float(timesteps[0])  # before the U-Net is queued: afterwards it would wait for it
        rows = rows_of(maps, self.prompts, x, self.trace.latent_shape)
        self._doubt(rows, transformer_options)
        if rows is None:
            return executor(x, timesteps, context, y, control, transformer_options, **kwargs)
        if self.dtype is None and self.moa.learned is not None:
            self.dtype = x.dtype
            cast_to(x.dtype, self.moa.learned.mixture)
        prior, attend = host_prior(executor.class_obj), host_attend(transformer_options)
        call = self.moa.call(
            rows, sigma, x, context, timesteps, prior, attend, self.present(sigma), self._hooked_weights()
        )
        options = patched_options(transformer_options, call, self.foreign)
        try:
            self.call = call
            out = executor(x, timesteps, context, y, control, options, **kwargs)
        finally:
            self.call = None
        if tuple(x.shape[-2:]) == self.trace.latent_shape:  # whole pictures, no areas of them
            record(self.trace, timestep, rows, call)
        self.moa.finish(call, rows, x)
        return out

    def _doubt(self, rows: Sequence[Row] | None, transformer_options: dict) -> None:
        if PARTS not in self.doubts and (rows is None or any(row.view.box == NOWHERE for row in rows)):
            self.doubts.append(PARTS)
        for message in couples(transformer_options):
            if message not in self.doubts:
                self.doubts.append(message)

    def _hooked_weights(self) -> Hashable:
        """What LoRA hooks with schedules make of the model's weights just now."""
        hooks = self.model.model.current_patcher.current_hooks
        return hooks and tuple((id(hook.hook_ref), hook.strength) for hook in hooks.hooks)


def record(trace: Trace, timestep: float, rows: Sequence[Row], call: Call) -> None:
    """Keep the shares of the rows under positive prompts."""
    start = 0
    for _, same in itertools.groupby(rows, key=lambda row: row.prompt):
        block = list(same)
        if block[0].positive:
            maps = {layer: share[start : start + len(block)] for layer, share in call.shares.items()}
            trace.add(timestep, maps, [row.view.picture for row in block])
        start += len(block)
