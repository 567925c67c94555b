"""All image experts of an IP-Adapter, and their work in one sampling run: the second kind of MoA."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from ..address import Address, BlockShape
from ..attention import Attend, Prior
from ..routing.word_router import WordReader, WordRouter, read_blocks
from ..subjects.rows import Row
from ..subjects.subject import Subject
from .image_expert import ImageMixture, file_order
from .rows import NOBODY, RowsPeople, RowsTokens, RowSubjects

ROWS_KEPT = 16
"""Of so many calls' rows tokens are kept: a host may show pictures in parts, and a film in ever new windows."""


class ImageRun:
    """One sampling run with image experts; used as LearnedRun is."""

    def __init__(
        self,
        mixture: ImageMixture,
        subjects: Sequence[Subject],
        pictures: int,
        size: tuple[int, int],
        levels: Sequence[float],
        strength: float,
        blocks: Mapping[Address, BlockShape],
        sparse: bool,
    ):
        """Of `pictures` latents (h, w); levels: the noise level of every step with MoA at work.

        subjects: those that any positive prompt carries. sparse makes no difference: a pixel's share is known before
        its layer, and only pixels with a share are computed.
        """
        self.mixture, self.strength = mixture, strength
        self.router = WordRouter(subjects, pictures, size, levels)
        self.layers = dict(zip(file_order(blocks), mixture.layers, strict=True))
        self.read = frozenset(read_blocks(blocks))
        self._shares: Tensor | None = None
        self._tokens: dict[tuple, RowsTokens] = {}
        self._people: dict[tuple, RowsPeople] = {}

    def call(
        self,
        rows: Sequence[Row],
        level: float,
        latents: Tensor,
        context: Tensor,
        timestep: Tensor,
        prior: Prior,
        attend: Attend | None = None,
        present: Collection[Subject] | None = None,
    ) -> ImageCall:
        """A U-Net call with latents [B, C, h, w], context [B, T, D] and timestep [B] at this noise level.

        present: subjects of the prompts that are at work at this level; None is all. Negative rows stand opposite
        them. attend is not asked: image tokens are few, and people are told apart by a mask.
        Waits for the device when the level is a new one, and never afterwards.
        """
        shares = self.router.at(level)
        if shares is not self._shares:
            self._shares = shares
            self._people.clear()
        there = frozenset(self.router.subjects if present is None else present)
        people = tuple(self._shown(row) for row in rows)
        if people not in self._tokens:
            if len(self._tokens) == ROWS_KEPT:
                self._tokens.clear()
            self._tokens[people] = RowsTokens.of(people, self.mixture.negative, latents)
        key = (tuple(rows), latents.shape, there)
        if key not in self._people:
            amounts = self._amounts(rows, people, shares, there, latents)
            self._people[key] = RowsPeople(amounts, self.strength, self.mixture.tokens, latents)
        words = WordReader(self.router, self.read, rows, context, prior)
        return ImageCall(self, self._people[key], self._tokens[people], words, prior)

    def finish(self, call: ImageCall, rows: Sequence[Row], latents: Tensor) -> None:
        """Note where the call's words were."""
        call.words.note(latents)

    def subject_shares(self) -> Tensor:
        """Every subject's share of every picture [S, P, h, w], as all steps of the run that is over show it."""
        self.router.finish()
        return self.router.last()

    def _shown(self, row: Row) -> RowSubjects:
        """Those that the router does not know come from a prompt that was encoded for others, and are nowhere."""
        if not row.positive:
            return NOBODY
        return row.view.picture, tuple(s for s in row.subjects if self.router.number(s) is not None)

    def _amounts(
        self,
        rows: Sequence[Row],
        people: Sequence[RowSubjects],
        shares: Tensor,
        present: Collection[Subject],
        latents: Tensor,
    ) -> Tensor:
        """How much of every subject each pixel of the rows gets, before strength: weight times share, [B, S, h, w].

        shares: [S, P, h, w]; present: the subjects that negative rows, which have one place, stand opposite to.
        """
        weight = torch.tensor([s.weight if s in present else 0.0 for s in self.router.subjects]).view(-1, 1, 1)
        most = max(1, *(len(subjects) for _, subjects in people))
        amounts = torch.zeros(len(rows), most, *latents.shape[2:])
        for number, (row, (_, subjects)) in enumerate(zip(rows, people, strict=True)):
            if row.view.picture >= self.router.pictures or not row.view.fits(self.router.size, latents):
                continue  # nothing is known of where this is
            shown = shares[(slice(None), *row.view.within(self.router.size))] * weight  # [S, h, w]
            if not row.positive:
                amounts[number, 0] = shown.sum(dim=0)
            for place, subject in enumerate(subjects):
                amounts[number, place] = shown[self.router.number(subject)]
        return amounts


class ImageCall:
    """One U-Net call."""

    def __init__(self, run: ImageRun, people: RowsPeople, tokens: RowsTokens, words: WordReader, prior: Prior):
        self.run, self.people, self.tokens, self.words, self.prior = run, people, tokens, words, prior
        self.shares: dict[tuple[Address, str], Tensor] = {}
        """The expert's share [B, h, w] of every cross-attention met so far."""
        self.pixels, self.asked = 0, 0
        """Pixels of all layers met so far, and those of them that went through the expert."""

    def mix(self, address: Address, attention: str, h: Tensor, prior: Tensor, size: tuple[int, int]) -> Tensor:
        """h: what entered the attention; prior: what the host made of it; both [B, N, C]. Returns the mixture.

        size: the layer's (height, width). Self-attention is the prior's.
        """
        if attention == "attn1":
            return prior
        self.words.read(address, h, size)
        pixels, self.shares[address, attention] = self.people.at(size)
        self.pixels += prior.shape[0] * prior.shape[1]
        if pixels is None:
            return prior
        self.asked += pixels.amount.numel()
        expert, projections = self.run.layers[address], self.prior(address)
        keys_values = self.tokens.of_expert(expert, projections.heads)
        if pixels.index is None:
            return torch.addcmul(prior, expert(h, keys_values, projections, pixels.mask), pixels.amount)
        index = pixels.index.expand(-1, -1, h.shape[-1])  # [B, K, C]
        delta = expert(h.gather(1, index), keys_values, projections, pixels.mask)
        return prior.scatter_add(1, index, delta * pixels.amount)
