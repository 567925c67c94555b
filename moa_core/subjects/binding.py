"""Binding: which token positions of an encoded prompt carry which subject."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from .subject import Subject


@dataclass(frozen=True)
class Binding:
    """One subject at one token position of an encoded prompt (counted through all its chunks)."""

    position: int
    subject: Subject


@dataclass(frozen=True, eq=False)
class OwnText:
    """A prompt as one subject's adapter reads it: encoded by its own text encoder, its trigger in place of the word."""

    subject: Subject
    texts: tuple[Tensor | None, ...]
    """[1, T, D] for each file of the adapter; None: the prompt as it is."""
    of_variants: bool = False
    """They are for each variant of the subject instead, the n-th for the n-th picture."""


@dataclass(frozen=True)
class BoundPrompt:
    """What is known of an encoded prompt: its text, its bindings, and how its subjects' adapters read it."""

    prompt: str
    bindings: tuple[Binding, ...] = ()
    own_texts: tuple[OwnText, ...] = ()

    def carries(self, subject: Subject) -> bool:
        return any(binding.subject == subject for binding in self.bindings)


def bind(
    prompt: str,
    chunks: Sequence[Sequence[object]],
    words: Sequence[Sequence[int]],
    subjects: Sequence[Subject],
    ends_word: Callable[[int], bool],
) -> BoundPrompt:
    """Bind the n-th subject with a word to the n-th occurrence of that word, on the word's last token.

    chunks: the prompt's tokens, chunk by chunk, start, end and padding tokens included; a token is an id,
    or anything else for an embedding that stands in a token's place. words: each subject's word as ids.
    ends_word: whether a token id ends a word, so that `man` is not found in `snowman`.
    """
    bindings = []
    taken: dict[tuple[int, ...], int] = {}
    for subject, word in zip(subjects, words, strict=True):
        places = find_word(chunks, word, ends_word)
        turn = taken.get(tuple(word), 0)
        taken[tuple(word)] = turn + 1
        if turn < len(places):
            bindings.append(Binding(places[turn], subject))
    return BoundPrompt(prompt, tuple(bindings))


def find_word(chunks: Sequence[Sequence[object]], word: Sequence[int], ends_word: Callable[[int], bool]) -> list[int]:
    """Positions of the last token of every occurrence of the word, counted through all chunks."""
    places, offset = [], 0
    for chunk in chunks:
        for start in range(1, len(chunk) - len(word) + 1):  # 0 is the start token
            before = chunk[start - 1]
            begins = start == 1 or not isinstance(before, int) or ends_word(before)
            if begins and list(word) == [t if isinstance(t, int) else None for t in chunk[start : start + len(word)]]:
                places.append(offset + start + len(word) - 1)
        offset += len(chunk)
    return places
