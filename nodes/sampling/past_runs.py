"""What is kept of sampling runs: for the runs that go on from them, and for Router Visualizer.

A picture is known again by its latents, bit by bit, and by nothing else: then a graph gives the same picture whatever
was sampled before. So it does not matter how often MoA Patch Model has run since.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import comfy.utils
import torch
import torch.nn.functional as F
from torch import Tensor

from ...moa_core.routing.trace import Trace
from ...moa_core.run import Places
from .run_notes import RunNotes

MOST_BYTES = 256 * 2**20
"""Of all runs together; the oldest go first."""
CLOSE = 1e-3
"""Latents that differ by no more are the same: a sampler's two outputs do so."""
OVERLAP = 0.01
"""The part of a picture's latents that one sampled in turns, region by region, must have from this region's run."""
UPSCALINGS = ("nearest-exact", "bilinear", "bicubic", "area", "bislerp")
"""The ways in which the host's nodes scale latents."""


@dataclass(eq=False)
class PastRun:
    """What is kept of a sampling run."""

    model: object
    """Tells the MODEL that it was sampled with from others."""
    samples: Tensor
    """The sampled latents, on the CPU."""
    levels: tuple[float, float]
    """The noise levels that it began and ended at."""
    trace: Trace
    """Empty where MoA did not act, or in no call that showed whole pictures."""
    missing: list[str]
    """A sentence for every subject that did not appear."""
    bound: bool
    """Whether any positive prompt carried a subject."""
    owners: Tensor
    """Whose each pixel is: the number of the subject [B, h, w], -1 for nobody's."""
    people: int
    """How many subjects the MODEL has."""
    places: Places
    numbers: list[int]
    """Of its pictures in the whole batch."""
    notes: RunNotes
    part: bool = False
    """Whether it was taken for a part of the picture that areas were drawn for."""

    @property
    def nbytes(self) -> int:
        return self.samples.nbytes + self.owners.nbytes + self.trace.nbytes + self.places.nbytes

    def stopped_at(self, level: float) -> bool:
        """Whether it was left with noise of that level, for another one to go on with."""
        start, end = self.levels
        return start > end > 0.0 and math.isclose(end, level, rel_tol=1e-4)


Source = tuple[PastRun, int]
"""A run, and which of its pictures."""


class PastRuns:
    """The last sampling runs, the newest last."""

    def __init__(self, most_bytes: int = MOST_BYTES):
        self.most_bytes = most_bytes
        self._runs: list[PastRun] = []

    def add(self, run: PastRun) -> None:
        """Keep a run, and let go of the oldest ones where all together are too large."""
        self._runs.append(run)
        held = sum(each.nbytes for each in self._runs)
        while held > self.most_bytes and len(self._runs) > 1:
            held -= self._runs.pop(0).nbytes

    def of(self, model: object) -> list[PastRun]:
        """Those of one MODEL."""
        return [run for run in self._runs if run.model is model]

    def newest_first(self, model: object) -> list[PastRun]:
        """All, that MODEL's own before the others."""
        return sorted(reversed(self._runs), key=lambda run: run.model is not model)


KEPT = PastRuns()


def gone_before(
    latents: Tensor, level: float, people: tuple, runs: Sequence[PastRun]
) -> tuple[list[Source] | None, bool]:
    """What a run of these people with latents [B, 4, h, w] at this noise level goes on from, picture by picture.

    And whether it is the same sampling that goes on, or another that begins with its result. None: it begins anew.
    """
    if not latents.flatten(1).any(dim=1).all():
        return None, False  # empty latents are nobody's
    latents = latents.detach().cpu()
    fitting = [run for run in runs if run.places.people == people]
    stopped = [run for run in fitting if run.stopped_at(level)]
    goes_on = whole(made_by(latents, stopped)) or _overlapping(latents, stopped)
    if goes_on is not None:
        return goes_on, True
    return whole(made_by(latents, fitting)) or _scaled(latents, fitting), False


def begins_whole(latents: Tensor, runs: Sequence[PastRun]) -> bool:
    """Whether a run begins with noise alone, or with latents [B, 4, h, w] that runs of whole pictures have made."""
    if not latents.any():
        return True
    latents = latents.detach().cpu()
    sources = whole(made_by(latents, runs)) or _overlapping(latents, runs) or _scaled(latents, runs)
    return sources is not None and not any(run.part for run, _ in sources)


def made_by(latents: Tensor, runs: Iterable[PastRun]) -> list[Source | None]:
    """For each of the latents [B, 4, h, w] on the CPU the first run that made it, and which of its pictures it is."""
    found: list[Source | None] = [None] * len(latents)
    for run in runs:
        if run.samples.shape[1:] == latents.shape[1:]:
            theirs = run.samples.to(latents.dtype)  # nodes may hand it on in half precision
            for number, picture in enumerate(latents):
                if found[number] is None:
                    same = _same(picture, theirs)
                    found[number] = None if same is None else (run, same)
        if None not in found:
            break
    return found


def whole(sources: list[Source | None]) -> list[Source] | None:
    """The sources of all pictures, or none."""
    return None if None in sources else sources


def closest(picture: Tensor, runs: Iterable[PastRun]) -> Source | None:
    """The picture that these latents [4, h, w] differ least from; None where no run has any of their size."""
    fitting = [run for run in runs if run.samples.shape[1:] == picture.shape]
    apart = [(run.samples - picture).square().flatten(1).mean(dim=1) for run in fitting]
    if not fitting:
        return None
    best = min(range(len(fitting)), key=lambda number: float(apart[number].min()))
    return fitting[best], int(apart[best].argmin())


def _same(picture: Tensor, others: Tensor) -> int | None:
    """Which of the others [P, 4, h, w] a picture [4, h, w] is."""
    probe = (..., slice(None, None, max(1, picture.shape[-1] // 8)))
    near = (others[probe].float() - picture[probe].float()).abs().flatten(1).amax(dim=1) <= CLOSE
    for number in near.nonzero().flatten().tolist():
        if torch.allclose(others[number].float(), picture.float(), rtol=0.0, atol=CLOSE):
            return number
    return None


def _overlapping(latents: Tensor, runs: Sequence[PastRun]) -> list[Source] | None:
    """The run that a part of every picture comes from, where others have sampled the rest in turn."""
    best, most = None, OVERLAP
    for run in runs:
        if run.samples.shape == latents.shape:
            equal = (run.samples.to(latents.dtype) - latents).float().abs().amax(dim=1) <= CLOSE  # [B, h, w]
            share = float(equal.float().mean(dim=(1, 2)).min())
            if share > most:
                best, most = run, share
    return None if best is None else [(best, number) for number in range(len(latents))]


def _scaled(latents: Tensor, runs: Sequence[PastRun]) -> list[Source] | None:
    """The run whose pictures these are after one of the host's scalings."""
    height, width = latents.shape[-2:]
    for run in runs:
        if run.samples.shape[1:2] != latents.shape[1:2] or run.samples.shape[-2:] == latents.shape[-2:]:
            continue
        samples = run.samples.to(latents.dtype)
        roughly = comfy.utils.common_upscale(samples, width, height, "bilinear", "disabled")
        ours, theirs = (F.normalize(each.float().flatten(1), dim=1) for each in (latents, roughly))
        alike, numbers = (ours @ theirs.T).max(dim=1)  # [B]
        if alike.min() < 0.5:
            continue
        for way in UPSCALINGS:
            scaled = comfy.utils.common_upscale(samples[numbers], width, height, way, "disabled")
            if torch.allclose(scaled.float(), latents.float(), rtol=CLOSE, atol=CLOSE):
                return [(run, number) for number in numbers.tolist()]
    return None


def owners_of(shares: Tensor, numbers: list[int]) -> Tensor:
    """Whose each pixel is [B, h, w], -1 for nobody's: by the shares [S, B, h, w] of the subjects of these numbers."""
    if not numbers:
        return torch.full(shares.shape[1:], -1)
    best, owner = shares.max(dim=0)
    return torch.tensor(numbers)[owner].where(best > 0, -1)
