"""Which pictures of a batch are sampled, where frames were taken out of it (LatentFromBatch, RebatchLatents).

The host keeps that in its LATENT as `batch_index`, and gives a sampling nothing of it but the noise: each picture's is
the one that the seed has for its index. So the noise tells.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...moa_core.subjects.subject import Subject
from .past_runs import Source

MOST_DRAWN = 1024
"""Of so many indices the noise is tried before it counts as somebody else's."""


def batch_numbers(noise: Tensor, seed: int | None, subjects: Sequence[Subject]) -> list[int]:
    """The pictures' numbers in the whole batch; their places in this one where the noise [B, 4, h, w] does not tell.

    Frames that all start from one noise (LatentBatchSeedBehavior, fixed) count on from the first one's index.
    """
    places = list(range(len(noise)))
    if not any(subject.variants > 1 or (subject.area is not None and len(subject.area) > 1) for subject in subjects):
        return places  # all pictures show the same
    drawn = None if seed is None or not noise.any() else _drawn(noise.cpu(), seed)
    if drawn is None:
        return places
    if len(set(drawn)) == 1:
        return [drawn[0] + place for place in places]
    return drawn if len(set(drawn)) == len(drawn) else places


def numbers_of_sources(sources: Sequence[Source]) -> list[int]:
    """The pictures' numbers where all are known: those that they were sampled as.

    One that is there again (RepeatLatentBatch) is another picture, and they count on as the host's numbers do.
    """
    numbers = [run.numbers[picture] for run, picture in sources]
    again = [sources[:place].count(source) for place, source in enumerate(sources)]
    span = max(numbers) - min(numbers) + 1
    return [number + span * times for number, times in zip(numbers, again, strict=True)]


def _drawn(noise: Tensor, seed: int) -> list[int] | None:
    """Of which indices the host draws these for the seed; None: they are not its."""
    random, found = torch.Generator().manual_seed(seed), [-1] * len(noise)
    for index in range(MOST_DRAWN):
        one = torch.randn(noise.shape[1:], generator=random).to(noise.dtype)
        for place, own in enumerate(noise):
            if found[place] < 0 and own.flatten()[0] == one.flatten()[0] and torch.equal(own, one):
                found[place] = index
        if min(found) >= 0:
            return found
    return None
