"""The adapters of several subjects at work in one sampling run, whatever kind each of them is."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..address import Address, BlockShape
from ..attention import Attend, Prior
from ..routing.word_router import WordRouter
from ..subjects.rows import Row
from ..subjects.subject import Subject
from .deltas import Deltas
from .image_expert import ImageMixture, file_order
from .rows import Ask, ImageAsk, RowsShares, TextAsk

ROWS_KEPT = 16
"""Of so many calls' rows the asks are kept: a host may show pictures in parts, and a film in ever new windows."""


@dataclass(frozen=True, eq=False)
class Adapters:
    """What makes subjects appear beside a prior without any training here."""

    images: Mapping[Subject, ImageMixture]
    """Those that appear by image tokens: their features."""
    parts: Mapping[Subject, Sequence[int]]
    """Those that appear by deltas, and the numbers of their parts; two may share one (a FaceID file's)."""
    deltas: Deltas | None = None
    fused: Collection[Subject] = frozenset()
    """Of those with deltas the ones whose features are in their own texts (PhotoMaker)."""

    @property
    def subjects(self) -> set[Subject]:
        return {*self.images, *self.parts}

    def amount(self, subject: Subject, picture: int) -> Tensor | float:
        """How much of each of its parts a subject with deltas has in the picture of that index.

        Its features say it, or, where those are image tokens or in its own text, its weight.
        """
        return subject.weight if subject in self.images or subject in self.fused else subject.feature(picture)


class AdapterRun:
    """One sampling run with adapters; the word router says where each acts."""

    def __init__(self, adapters: Adapters, router: WordRouter, strength: float, blocks: Mapping[Address, BlockShape]):
        self.adapters, self.router, self.strength = adapters, router, strength
        known = adapters.subjects
        self.numbers = {subject: n for n, subject in enumerate(s for s in router.subjects if s in known)}
        self._order = file_order(blocks)
        self._content: dict[tuple, RowsContent] = {}
        self._shares: Tensor | None = None
        self._shown: dict[tuple, RowsShares] = {}

    def call(
        self,
        rows: Sequence[Row],
        shares: Tensor,
        latents: Tensor,
        context: Tensor,
        prior: Prior,
        present: Collection[Subject],
        weights: Hashable = None,
    ) -> AdapterCall:
        """A U-Net call with latents [B, C, h, w] and context [B, T, D], where each subject has its shares [S, P, h, w].

        present: subjects of the prompts that are at work at this level; negative rows stand opposite them.
        weights: tells what the host has done to the prior's weights in this call, where that changes in a run.
        """
        if shares is not self._shares:
            self._shares = shares
            self._shown.clear()
        rows, there = tuple(rows), frozenset(present)
        key = (rows, context.shape, weights)
        if key not in self._content:
            if len(self._content) == ROWS_KEPT:
                self._content.clear()
                self._shown.clear()
            self._content[key] = self._content_of(rows, context, prior)
        content = self._content[key]
        shown = (key, latents.shape, there)
        if shown not in self._shown:
            where = self._shares_of(rows, shares, there, latents)
            self._shown[shown] = RowsShares(where, content.parts, latents)
        return AdapterCall(self, self._shown[shown], content, prior)

    def _content_of(self, rows: Sequence[Row], context: Tensor, prior: Prior) -> RowsContent:
        deltas, asks = self.adapters.deltas, []
        amounts = torch.zeros(len(rows), len(self.numbers), 0 if deltas is None else deltas.parts)  # [B, S, P]
        changed = {n: subject for subject, n in self.numbers.items() if subject in self.adapters.parts}
        for number, subject in changed.items():
            for row, of_row in zip(rows, amounts, strict=True):
                amount = self.adapters.amount(subject, row.view.variant)
                of_row[number, self.adapters.parts[subject]] = amount * self.strength
        if changed:
            asks.append(TextAsk(deltas, changed, rows, context, amounts, self.strength))
        for mixture in dict.fromkeys(self.adapters.images[s] for s in self.numbers if s in self.adapters.images):
            layers = {prior(a).name: layer for a, layer in zip(self._order, mixture.layers, strict=True)}
            people = {n: s for s, n in self.numbers.items() if self.adapters.images.get(s) is mixture}
            asks.append(ImageAsk(mixture, layers, people, rows, self.strength, context))
        return RowsContent(asks, amounts)

    def _shares_of(self, rows: Sequence[Row], shares: Tensor, present: Collection[Subject], latents: Tensor) -> Tensor:
        """[B, S, h, w] of the subjects with adapters: in a row those that it carries, in a negative one all present."""
        shown = torch.zeros(len(rows), len(self.numbers), *latents.shape[2:])
        for row, of_row in zip(rows, shown, strict=True):
            if row.view.picture >= self.router.pictures or not row.view.fits(self.router.size, latents):
                continue  # nothing is known of where this is
            where = shares[(slice(None), *row.view.within(self.router.size))]  # [all subjects, h, w]
            there = row.subjects if row.positive else present
            for subject in self.numbers.keys() & set(there):
                of_row[self.numbers[subject]] = where[self.router.number(subject)]
        return shown


@dataclass(frozen=True)
class RowsContent:
    """What the rows of a call carry, the same in all steps."""

    asks: list[Ask]
    parts: Tensor
    """[B, S, P]: how much each subject has of each part of the deltas."""


class AdapterCall:
    """One U-Net call."""

    def __init__(self, run: AdapterRun, where: RowsShares, content: RowsContent, prior: Prior):
        self.where, self.prior, self.deltas, self.strength = where, prior, run.adapters.deltas, run.strength
        self.asks = content.asks if where.anyone else []

    def share(self, size: tuple[int, int]) -> Tensor:
        """[B, h, w]: how much of each pixel of a layer of (h, w) the subjects have."""
        return self.where.at(size).all

    def effect(self, size: tuple[int, int]) -> Tensor:
        """The same after strength, for the trace."""
        shares = self.where.at(size)
        if shares.effect is None:
            shares.effect = (shares.all * self.strength).clamp(max=1.0)
        return shares.effect

    def changed(self, name: str, x: Tensor, out: Tensor, size: tuple[int, int]) -> Tensor:
        """out, what the prior's layer of that name made of x, with every subject's delta where it is.

        [B, N, C] with N = h w, or [B, C, h, w]; size: (h, w) of the output.
        """
        layer = self.deltas.of(name) if self.where.anyone and len(x) == self.where.rows else None
        return out if layer is None else layer(x, out, self.where.at(size).amounts)

    def attended(self, address: Address, q: Tensor, prompt: Tensor, size: tuple[int, int], attend: Attend) -> Tensor:
        """What the pixels see in cross-attention, before its output projection, [B, N, C].

        q: the prior's queries [B, N, C]; prompt: what they see of the prompt; size: (h, w) of the layer.
        """
        seen = prompt
        for ask in self.asks:
            keys, values = ask.keys_values(self.prior(address))
            amount, subjects = self.where.at(size).of(ask), len(ask.numbers)  # [B, N, S]
            asked = q if subjects == 1 else q.repeat_interleave(subjects, dim=0)
            answers = attend(asked, keys, values, self.prior(address).heads)  # [B * S, N, C]
            if subjects == 1:
                seen = torch.lerp(seen, answers, amount) if ask.instead else torch.addcmul(seen, answers, amount)
                continue
            added = torch.einsum("bsnc,bns->bnc", answers.unflatten(0, (-1, subjects)), amount)
            seen = seen * (1 - amount.sum(dim=-1, keepdim=True)) + added if ask.instead else seen + added
        return seen
