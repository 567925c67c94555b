"""A prompt as PhotoMaker's subject reads it: the word once for each photo, fused with what the photo shows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import comfy.sd
from torch import Tensor

from ...moa_core.subjects.subject import Subject
from .text_towers import ROOM, Tower
from .trigger import Places, with_trigger


def fused_texts(
    clip: comfy.sd.CLIP, towers: Sequence[Tower], tokens: dict[str, list], where: Places, subject: Subject
) -> list[list[Tensor]]:
    """For each variant of the subject the texts [1, T, D] of the schedule."""
    maker = subject.adapter
    identities = subject.features.unflatten(1, (-1, maker.feature_dim))  # [V, P, D]
    photos, repeated, places = identities.shape[1], dict(tokens), []
    for tower in towers:
        if tower.name in where:
            place, chunks = where[tower.name], tokens[tower.name]
            words = [token for chunk in tower.chunks(tokens) for token in chunk][slice(*place)]
            trigger = [(token, 1.0) for token in [*words, *words[-1:] * (photos - 1)]]
            repeated[tower.name] = with_trigger(tower, chunks, place, [tower.chunk(trigger)])
            places = places or _places(tower, repeated[tower.name], place[1] - 1, photos)
    texts = [text for text, _ in comfy.sd.CLIP.clone(clip).encode_from_tokens_scheduled(repeated, show_pbar=False)]
    return [[maker.fused(text, places, variant, subject.weight) for text in texts] for variant in identities]


def _places(tower: Tower, chunks: Sequence[list], first: int, count: int) -> list[int]:
    """Where a token at a place and what was put in after it are, counted through all chunks as the encoder reads them.

    What no longer fits into the first token's chunk is in the next one, after its start.
    """
    lengths = [len(tower.seen(chunk)) for chunk in chunks]
    ends = list(accumulate(lengths))
    number = next(n for n, end in enumerate(ends) if first < end)
    starts = [end - length for end, length in zip(ends, lengths, strict=True)]
    last = starts[number] + ROOM  # of text in that chunk
    here = [place for place in range(first, first + count) if place <= last]
    return here + [starts[number + 1] + 1 + n for n in range(count - len(here))]
