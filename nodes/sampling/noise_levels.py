"""When in a sampling who is at work, in the host's noise levels (sigmas)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...moa_core.routing.subject_area import opening_end
from ...moa_core.routing.trace import TIMESTEPS
from ...moa_core.subjects.subject import Subject
from .bound_rows import CONDPrompt


def learned_from(sampling, timesteps: int, sigmas: Tensor) -> float:
    """The noise level from which on a MoA acts in a run with these levels [steps + 1]: between the last timestep that
    it was trained on and the next one.

    The step that finishes a picture is its in any case: it may be the only one (Turbo), and is noisier then.
    """
    if timesteps == TIMESTEPS:
        return math.inf
    trained = float(sampling.sigma(torch.tensor(timesteps - 0.5)))
    finishes = len(sigmas) > 1 and float(sigmas[-1]) == 0.0
    return max(trained, float(sigmas[-2])) if finishes else trained


def cut_from(sampling, first: float, end_percent: float) -> float:
    """The noise level at which the opening of a sampling from the level `first` to end_percent is over."""
    low, high = 0.0, 1.0  # what part of all sampling lies before `first`
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if float(sampling.percent_to_sigma(middle)) > first else (low, middle)
    opening = opening_end(TIMESTEPS * (1 - low), TIMESTEPS * (1 - end_percent))
    return float(sampling.percent_to_sigma(1 - opening / TIMESTEPS))


def spans(conds: dict, prompts: Sequence[CONDPrompt], sampling) -> list[tuple[float, float, list[Subject]]]:
    """When each positive prompt of the guider's is at work (SetTimestepRange), and its subjects."""
    spans = []
    for conditioning, prompt in zip(itertools.chain(*conds.values()), prompts, strict=True):
        if prompt.bound is not None:
            percents = conditioning.get("start_percent", 0.0), conditioning.get("end_percent", 1.0)
            start, end = (float(sampling.percent_to_sigma(percent)) for percent in percents)
            spans.append((start, end, [bound.subject for bound in prompt.bound.bindings]))
    return spans
