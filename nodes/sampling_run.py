"""What a patched MODEL does around one sampling run."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..moa_core.adapters.run import ImageRun
from ..moa_core.learned.run import LearnedRun
from ..moa_core.routing.trace import TIMESTEPS, Trace
from ..moa_core.subjects.binding import BoundPrompt
from ..moa_core.subjects.subject import Subject
from .bound_rows import MODEL_COND, CONDBindings
from .clip_binding import BOUND_PROMPT, NotedPrompt
from .host_layers import unet_blocks
from .messages import NodeText
from .missing_subjects import missing_subjects
from .unet_call import SamplingRun

KEY = "moa"
RUNS_KEPT = 4


@dataclass
class PastRun:
    """What is kept of a sampling run."""

    samples: Tensor
    """The sampled latents, on the CPU."""
    trace: Trace
    """Empty where MoA did not act, or in no call that showed whole pictures."""
    missing: list[str]
    """A sentence for every subject that did not appear."""
    bound: bool
    """Whether any positive prompt carried a subject."""
    owners: Tensor
    """Whose each pixel is: the number of the subject [B, h, w], -1 for nobody's."""


class MoAHooks:
    """Two wrappers: one around a sampling run, one around every U-Net call in it.

    Nothing is patched outside a call, so that the attention patches of a call can be put where they
    belong whatever else is patched: ours see h before anyone changes it (token merging, tiling) and the
    attention's output after everyone else is done.
    """

    def __init__(
        self,
        start_run: Callable[..., LearnedRun | ImageRun],
        subjects: Sequence[Subject],
        strength: float,
        start_percent: float,
        end_percent: float,
        sparse: bool,
        text: NodeText | None = None,
        timesteps: int = TIMESTEPS,
    ):
        """start_run: LearnedRun or ImageRun with its mixture. timesteps: those it was trained on."""
        self.start_run, self.subjects, self.strength, self.sparse = start_run, subjects, strength, sparse
        self.start_percent, self.end_percent = start_percent, end_percent
        self.text, self.timesteps = text or NodeText(), timesteps
        self.runs: deque[PastRun] = deque(maxlen=RUNS_KEPT)
        """The last runs, the newest last."""
        self._run: SamplingRun | None = None

    def attach(self, model: ModelPatcher, mixture: ModelPatcher) -> None:
        model.set_additional_models(KEY, [mixture])
        model.set_attachments(KEY, self)
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, self.sample)
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, self.call_unet)

    def sample(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        """Around one sampling run: noise [B, 4, h, w], sigmas [steps + 1].

        Without a subject in any positive prompt it is the plain checkpoint's.
        """
        guider = executor.class_obj
        bindings = [_bindings(name, c, len(noise)) for name, conds in guider.conds.items() for c in conds]
        positives = [binding.prompt for binding in bindings if binding.positive]
        missing = missing_subjects(self.subjects, positives)
        self.text.say(missing)
        bound = any(prompt is not None and prompt.bindings for prompt in positives)
        if bound:
            for conditioning, binding in zip(itertools.chain(*guider.conds.values()), bindings, strict=True):
                conditioning["model_conds"] = {**conditioning["model_conds"], MODEL_COND: binding}
        sampling = guider.model_patcher.get_model_object("model_sampling")
        start, end = (float(sampling.percent_to_sigma(p)) for p in (self.start_percent, self.end_percent))
        start = min(start, _trained_sigma(sampling, self.timesteps))
        size = tuple(noise.shape[-2:])
        levels = [sigma for sigma in sigmas[:-1].tolist() if end <= sigma <= start]
        blocks = unet_blocks(guider.model_patcher)
        known = [s for s in self.subjects if any(p is not None and p.carries(s) for p in positives)]
        moa = self.start_run(known, len(noise), size, levels, self.strength, blocks, self.sparse)
        run = SamplingRun(start, end, Trace(size), moa, _spans(guider.conds, bindings, sampling))
        outer, self._run = self._run, run
        try:
            samples = executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            self._run = outer
        run.trace.to_cpu()
        owners = _owners(run.moa.subject_shares(), [self.subjects.index(subject) for subject in known])
        sentences = [str(message) for message in missing]
        self.runs.append(PastRun(samples.detach().cpu(), run.trace, sentences, bound, owners))
        return samples

    def call_unet(self, executor, *args, **kwargs):
        """Around one U-Net call; one without rows is the base model's own, compiled or not."""
        if MODEL_COND not in kwargs:
            return executor(*args, **kwargs)
        if self._run is None:
            return executor(*args, **{name: given for name, given in kwargs.items() if name != MODEL_COND})
        return self._run.call_unet(executor, *args, **kwargs)


def _trained_sigma(sampling, timesteps: int) -> float:
    """The noise level between the last timestep that a MoA was trained on and the next one."""
    return math.inf if timesteps == TIMESTEPS else float(sampling.sigma(torch.tensor(timesteps - 0.5)))


def _bindings(name: str, conditioning: dict, pictures: int) -> CONDBindings:
    """What one of the guider's conditionings binds; nothing in the negative ones."""
    positive, text = "negative" not in name, conditioning.get("cross_attn")
    prompt: BoundPrompt | None = conditioning.get(BOUND_PROMPT) if positive else None
    if isinstance(prompt, NotedPrompt) and text is not None:
        prompt = prompt.grown_to(text)
    return CONDBindings.of_batch(pictures, prompt, text.shape[1] if text is not None else 1, positive)


def _spans(conds: dict, bindings: list[CONDBindings], sampling) -> list[tuple[float, float, list[Subject]]]:
    """When each positive prompt of the guider's is at work (SetTimestepRange), and its subjects."""
    spans = []
    for conditioning, binding in zip(itertools.chain(*conds.values()), bindings, strict=True):
        if binding.prompt is not None:
            percents = conditioning.get("start_percent", 0.0), conditioning.get("end_percent", 1.0)
            start, end = (float(sampling.percent_to_sigma(percent)) for percent in percents)
            spans.append((start, end, [bound.subject for bound in binding.prompt.bindings]))
    return spans


def _owners(shares: Tensor, numbers: list[int]) -> Tensor:
    """From the shares [S, B, h, w] of the subjects with these numbers."""
    if not numbers:
        return torch.full(shares.shape[1:], -1)
    best, owner = shares.max(dim=0)
    return torch.tensor(numbers)[owner].where(best > 0, -1)
