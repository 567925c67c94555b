"""What the rows of a U-Net call show and carry."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .binding import Binding, OwnText
from .subject import Subject
from .view import View


@dataclass(frozen=True)
class Row:
    """One row of a U-Net call."""

    view: View
    bindings: tuple[Binding, ...]
    """Empty where nothing binds: a negative prompt, or one that no MoA CLIP encoded."""
    tokens: int
    """Length of the row's own text embedding; a host repeats it to match longer ones in the batch."""
    positive: bool
    """Whether the row is under a positive prompt."""
    own_texts: tuple[OwnText, ...] = ()
    prompt: object = None
    """Tells the row's prompt from others: rows under the same one read the same text in all steps."""

    def places(self, length: int) -> Iterator[tuple[int, Subject]]:
        """Every position that carries a subject, in a context of that length."""
        for binding in self.bindings:
            for start in range(0, length - self.tokens + 1, self.tokens):
                yield binding.position + start, binding.subject

    @property
    def subjects(self) -> list[Subject]:
        return list(dict.fromkeys(binding.subject for binding in self.bindings))
