"""Other tokens in the place of a word of a tokenized prompt."""

from __future__ import annotations

from collections.abc import Sequence

from .text_towers import ROOM, Tower

Places = dict[str, tuple[int, int]]
"""Of a word in a tokenized prompt: [from, to), counted through all chunks, by the name of the tower."""


def with_trigger(tower: Tower, chunks: Sequence[list], place: tuple[int, int], trigger: Sequence[list]) -> list[list]:
    """Chunks of (token, weight) with the trigger's tokens in the place of a word's [from, to), counted through all.

    What no longer fits into a chunk goes into a new one after it.
    """
    made, offset = [], 0
    for chunk in chunks:
        seen = tower.seen(chunk)  # the indices of the tokens that the encoder reads
        if offset <= place[0] < offset + len(seen):
            first, last = seen[place[0] - offset], seen[place[1] - 1 - offset]
            weight = chunk[first][1]
            instead = [(token, own * weight) for part in trigger for token, own, *_ in tower.body(part)]
            body = [*tower.body(chunk[:first]), *instead, *tower.body([chunk[0], *chunk[last + 1 :]])]
            made += [tower.chunk(body[at : at + ROOM]) for at in range(0, max(len(body), 1), ROOM)]
        else:
            made.append(chunk)
        offset += len(seen)
    return made
