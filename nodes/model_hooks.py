"""MoA inside ComfyUI's sampling: what a patched MODEL does beside the base model."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..moa_core.address import Address
from ..moa_core.binding import BoundPrompt
from ..moa_core.moa import ATTENTIONS, Mixture
from ..moa_core.moa_layer import SparsePlan
from ..moa_core.subject import Subject
from ..moa_core.trace import Trace
from ..moa_core.unet_call import UNetCall
from .bound_rows import MODEL_COND, CONDRows, Rows
from .clip_binding import BOUND_PROMPT

KEY = "moa"
TRACES_KEPT = 4


@dataclass
class Run:
    """One sampling run."""

    start_sigma: float
    end_sigma: float
    trace: Trace
    plan: SparsePlan


class MoAHooks:
    """Two wrappers: one around a sampling run, one around every U-Net call in it.

    Nothing is patched outside a call, so that the attention patches of a call can be put where they
    belong whatever else is patched: ours see h before anyone changes it (token merging, tiling) and the
    attention's output after everyone else is done.
    """

    def __init__(
        self,
        mixture: Mixture,
        subjects: Sequence[Subject],
        strength: float,
        start_percent: float,
        end_percent: float,
        sparse: bool,
    ):
        self.mixture, self.subjects, self.strength, self.sparse = mixture, subjects, strength, sparse
        self.start_percent, self.end_percent = start_percent, end_percent
        self.traces: deque[tuple[Tensor, Trace]] = deque(maxlen=TRACES_KEPT)
        """(sampled latents, trace) of the last runs, the newest last."""
        self._run: Run | None = None

    def attach(self, model: ModelPatcher, mixture: ModelPatcher) -> None:
        model.set_additional_models(KEY, [mixture])
        model.set_attachments(KEY, self)
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, self.sample)
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, self.call_unet)

    def sample(self, executor, noise, *args, **kwargs):
        """Around one sampling run."""
        guider = executor.class_obj
        self._note_bindings(guider.conds)
        sampling = guider.model_patcher.get_model_object("model_sampling")
        run = Run(
            float(sampling.percent_to_sigma(self.start_percent)),
            float(sampling.percent_to_sigma(self.end_percent)),
            Trace(tuple(noise.shape[-2:])),
            SparsePlan(),
        )
        outer, self._run = self._run, run
        try:
            samples = executor(noise, *args, **kwargs)
        finally:
            self._run = outer
        if run.trace:
            run.trace.to_cpu()
            self.traces.append((samples.detach().cpu(), run.trace))
        return samples

    def call_unet(self, executor, x, timesteps, context, y=None, control=None, transformer_options={}, **kwargs):  # noqa: B006
        """Around one U-Net call: x [B, 4, h, w], timesteps [B], context [B, T, D]."""
        rows: Rows | None = kwargs.pop(MODEL_COND, None)
        run = self._run
        if (
            run is None
            or rows is None
            or not run.end_sigma <= float(transformer_options["sigmas"][0]) <= run.start_sigma
        ):
            return executor(x, timesteps, context, y, control, transformer_options, **kwargs)
        timestep = float(timesteps[0])  # before the U-Net is queued: afterwards it would wait for it

        def once(sparse: SparsePlan | bool | None) -> tuple[UNetCall, Tensor]:
            call = UNetCall(self.mixture, context, timesteps, rows.bound_tokens(context), self.strength, sparse)
            return call, executor(x, timesteps, context, y, control, _with_patches(transformer_options, call), **kwargs)

        # Reading a number off a CPU is free; off an accelerator it would stall every layer.
        call, out = once((True if x.device.type == "cpu" else run.plan) if self.sparse else None)
        if not call.complete():
            call, out = once(None)
        self._record(run.trace, timestep, rows, call)
        return out

    def _note_bindings(self, conds: dict[str, list[dict]]) -> None:
        """Give every conditioning its bindings, negative ones none, and warn of subjects that found no word."""
        positives = []
        for name, conditionings in conds.items():
            positive = "negative" not in name
            for conditioning in conditionings:
                prompt: BoundPrompt | None = conditioning.get(BOUND_PROMPT) if positive else None
                text = conditioning.get("cross_attn")
                tokens = text.shape[1] if text is not None else 1
                conditioning["model_conds"] = {
                    **conditioning["model_conds"],
                    MODEL_COND: CONDRows((prompt, tokens, positive)),
                }
                positives += [prompt] if positive else []
        for sentence in _missing(self.subjects, positives):
            logging.warning(sentence)

    @staticmethod
    def _record(trace: Trace, timestep: float, rows: Rows, call: UNetCall) -> None:
        """Keep the shares of the rows that show whole pictures, in the order of the pictures."""
        traced = [index for index, row in enumerate(rows.rows) if row.traced]
        if not traced:
            return
        pictures = 1 + max(rows.rows[index].picture for index in traced)
        for start in range(0, len(traced), pictures):  # once for each positive prompt
            index = traced[start : start + pictures]
            trace.add(timestep, {layer: share[index[0] : index[-1] + 1] for layer, share in call.shares.items()})


def _with_patches(transformer_options: dict, call: UNetCall) -> dict:
    """The options of one U-Net call with its attention patches: first in, last out."""
    patches = dict(transformer_options.get("patches", {}))
    held: dict[str, Tensor] = {}

    def hold(attention: str):
        def before(h, context, value, extra_options):
            held[attention] = h
            return h, context, value

        return before

    def mix(attention: str):
        def after(prior, extra_options):
            kind, number = extra_options["block"]
            address = Address(kind, number, extra_options["block_index"])
            return call.mix(address, attention, held.pop(attention), prior)

        return after

    for attention in ATTENTIONS:
        before, after = f"{attention}_patch", f"{attention}_output_patch"
        patches[before] = [hold(attention), *patches.get(before, [])]
        patches[after] = [*patches.get(after, []), mix(attention)]
    return {**transformer_options, "patches": patches}


def _missing(subjects: Sequence[Subject], prompts: list[BoundPrompt | None]) -> list[str]:
    """A sentence for every subject that no positive prompt carries."""
    known = [prompt for prompt in prompts if prompt is not None]
    if subjects and not known:
        return [
            "MoA: no subject will appear, because no positive prompt was encoded with MoA Patch Model's CLIP. "
            "Connect that CLIP to the CLIPTextEncode of the positive prompt."
        ]
    bound = {id(binding.subject) for prompt in known for binding in prompt.bindings}
    quoted = " and ".join(dict.fromkeys(f"'{prompt.prompt}'" for prompt in known))
    sentences = []
    for number, subject in enumerate(subjects):
        if id(subject) not in bound:
            same = sum(other.word == subject.word for other in subjects[: number + 1])
            sentences.append(
                f"MoA: subject{number} will not appear: the prompt {quoted} does not hold the word '{subject.word}'"
                f"{'' if same == 1 else f' {same} times'}. Write it there, or change the word in Subject Encoder."
            )
    return sentences
