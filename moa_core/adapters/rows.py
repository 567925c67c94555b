"""Whose image tokens the rows of a U-Net call attend to, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..subjects.subject import Subject
from .image_expert import ImageExpert, KeysValues

EVEN = 1e-4
"""Shares of a pixel that differ by less are equal."""

RowSubjects = tuple[int, tuple[Subject, ...]]
"""A row's picture, and the subjects whose tokens it has."""
NOBODY: RowSubjects = (-1, ())
"""A row under a negative prompt: it has the tokens of a picture that shows nobody."""


class RowsTokens:
    """The image tokens of a U-Net call's rows, and what the experts make of them: the same in all steps."""

    def __init__(self, tokens: Tensor):
        """tokens: [B, S * n, D] on the device; 0 for rows with fewer than S people."""
        self.tokens = tokens
        self._keys_values: dict[ImageExpert, KeysValues] = {}

    @classmethod
    def of(cls, rows: Sequence[RowSubjects], negative: Tensor, like: Tensor) -> RowsTokens:
        """negative: what NOBODY has, [n, D]; like: of the layers' type."""
        most = max(1, *(len(subjects) for _, subjects in rows))
        tokens = torch.zeros(len(rows), most, *negative.shape)
        for number, row in enumerate(rows):
            if row == NOBODY:
                tokens[number, 0] = negative
            picture, subjects = row
            for place, subject in enumerate(subjects):
                tokens[number, place] = subject.feature(picture).view_as(negative)
        return cls(tokens.flatten(1, 2).to(like))

    def of_expert(self, expert: ImageExpert, heads: int) -> KeysValues:
        if expert not in self._keys_values:
            self._keys_values[expert] = expert.keys_values(self.tokens, heads)
        return self._keys_values[expert]


@dataclass(frozen=True)
class PersonPixels:
    """Those of a layer's pixels that ask the expert; rows with fewer than K are filled up with others."""

    index: Tensor | None
    """[B, K, 1]; None: all of them, in order."""
    amount: Tensor
    """[B, K, 1]: how much of delta each gets, after strength; 0 for what fills up."""
    mask: Tensor | None
    """bool [B, K, S * n]: the tokens of the one person a pixel belongs to; None where rows have one person each."""


class RowsPeople:
    """Who is where in the rows of one U-Net call; a negative row has one, whose picture shows nobody."""

    def __init__(self, amounts: Tensor, strength: float, tokens: int, like: Tensor):
        """amounts: [B, S, h, w] on the CPU, before strength; tokens: of one person; like: of the layers' type."""
        self.amounts, self.strength, self.tokens = amounts, strength, tokens
        self._like = like.new_empty(0)
        self._sized: dict[tuple[int, int], tuple[PersonPixels | None, Tensor]] = {}

    def at(self, size: tuple[int, int]) -> tuple[PersonPixels | None, Tensor]:
        """The pixels of a layer of (h, w) that ask the expert, None where none does, and all shares [B, h, w]."""
        if size not in self._sized:
            self._sized[size] = self._at(size)
        return self._sized[size]

    def _at(self, size: tuple[int, int]) -> tuple[PersonPixels | None, Tensor]:
        device, people = self._like.device, self.amounts.shape[1]
        shown = F.interpolate(self.amounts, size, mode="area").flatten(2)  # [B, S, N]
        amount = shown.sum(dim=1)  # [B, N]
        # Where two people have equal parts of a pixel the first has it, whatever the rounding.
        person = (shown > shown.amax(dim=1, keepdim=True) - EVEN).int().argmax(dim=1)  # [B, N]
        amount = self.strength * amount
        asks = (amount > 0).float()
        most = int(asks.sum(dim=1).max())
        share = amount.clamp(0.0, 1.0).unflatten(1, size).to(device)
        if most == 0:
            return None, share
        index = None
        if most < amount.shape[1]:
            index = asks.argsort(dim=1, descending=True, stable=True)[:, :most]
            amount, person = amount.gather(1, index), person.gather(1, index)
            index = index[..., None].to(device)
        mask = None
        if people > 1:
            owner = torch.arange(people).repeat_interleave(self.tokens)  # [S * n]
            mask = (person[..., None] == owner).to(device)
        return PersonPixels(index, amount[..., None].to(self._like), mask), share
