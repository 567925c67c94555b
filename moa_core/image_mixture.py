"""All image experts of an IP-Adapter, and their work in one sampling run: the second kind of MoA."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .address import Address, BlockShape
from .expert import Attend
from .image_expert import ImageExpert, Prior
from .rows import Row
from .subject import Subject
from .word_router import WordReader, WordRouter, read_blocks

_KINDS = ("input", "output", "middle")
EVEN = 1e-4
"""Shares of a pixel that differ by less are equal."""


def file_order(blocks: Mapping[Address, BlockShape]) -> list[Address]:
    """The order in which an IP-Adapter file numbers its layers: the encoder's, the decoder's, the middle's."""
    return sorted(blocks, key=lambda address: (_KINDS.index(address.kind), address.block, address.index))


class ImageMixture(nn.Module):
    """One image expert for each cross-attention, in the file's order, and the tokens of a row without a picture."""

    def __init__(self, shapes: Sequence[BlockShape], tokens: int, operations: Any = nn, **factory: Any):
        """tokens: how many a picture has."""
        super().__init__()
        self.shapes, self.tokens = list(shapes), tokens
        self.layers = nn.ModuleList(ImageExpert(s.dim, s.context_dim, operations, **factory) for s in shapes)
        self.negative = torch.zeros(tokens, shapes[0].context_dim)
        """[n, D] on the CPU."""

    @property
    def feature_dim(self) -> int:
        """Width of a subject's feature: its tokens [n, D] in one row."""
        return self.negative.numel()

    def fits(self, blocks: Mapping[Address, BlockShape]) -> bool:
        """Whether these are the blocks of a U-Net it was made for."""
        return self.shapes == [blocks[address] for address in file_order(blocks)]


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
        key = (tuple(rows), latents.shape, there)
        if key not in self._people:
            self._people[key] = RowsPeople.of(rows, shares, there, self.router, self.mixture, latents)
        words = WordReader(self.router, self.read, rows, context, prior)
        return ImageCall(self, self._people[key], words, prior)

    def finish(self, call: ImageCall, rows: Sequence[Row], latents: Tensor) -> None:
        """Note where the call's words were."""
        call.words.note(latents)

    def subject_shares(self) -> Tensor:
        """Every subject's share of every picture [S, P, h, w], as all steps of the run that is over show it."""
        self.router.finish()
        return self.router.last()


@dataclass(frozen=True)
class PersonPixels:
    """Those of a layer's pixels that ask the expert; rows with fewer than K are filled up with others."""

    index: Tensor | None
    """[B, K]; None: all of them, in order."""
    amount: Tensor
    """[B, K]: how much of delta each gets, before strength; 0 for what fills up."""
    mask: Tensor | None
    """bool [B, K, S * n]: the tokens of the one person a pixel belongs to; None where rows have one person each."""


@dataclass
class RowsPeople:
    """Who is where in the rows of one U-Net call; a negative row has one, whose picture shows nobody."""

    tokens: Tensor
    """[B, S * n, D] on the device; 0 for rows with fewer than S people."""
    amounts: Tensor
    """[B, S, h, w] on the CPU: share times the subject's weight."""
    _sized: dict[tuple[int, int], tuple[PersonPixels | None, Tensor]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        rows: Sequence[Row],
        shares: Tensor,
        present: Collection[Subject],
        router: WordRouter,
        mixture: ImageMixture,
        latents: Tensor,
    ) -> RowsPeople:
        """shares: [S, P, h, w]; present: the subjects that negative rows stand opposite to.

        Subjects that the router does not know come from a prompt that was encoded for other ones, and are nowhere.
        """
        weight = torch.tensor([s.weight if s in present else 0.0 for s in router.subjects]).view(-1, 1, 1)
        people = [[s for s in row.subjects if row.positive and router.number(s) is not None] for row in rows]
        most = max(1, *map(len, people))
        size = tuple(latents.shape[2:])
        tokens = torch.zeros(len(rows), most, mixture.tokens, mixture.negative.shape[-1])
        amounts = torch.zeros(len(rows), most, *size)
        for number, row in enumerate(rows):
            if row.view.picture >= router.pictures or not row.view.fits(router.size, latents):
                continue  # nothing is known of where this is
            shown = shares[(slice(None), *row.view.within(router.size))] * weight  # [S, h, w]
            if not row.positive:
                tokens[number, 0] = mixture.negative
                amounts[number, 0] = shown.sum(dim=0)
                continue
            for place, subject in enumerate(people[number]):
                tokens[number, place] = subject.feature(row.view.picture).view_as(tokens[number, place])
                amounts[number, place] = shown[router.number(subject)]
        return cls(tokens.flatten(1, 2).to(latents), amounts)

    def at(self, size: tuple[int, int]) -> tuple[PersonPixels | None, Tensor]:
        """The pixels of a layer of (h, w) that ask the expert, None where none does, and all amounts [B, h, w]."""
        if size not in self._sized:
            self._sized[size] = self._at(size)
        return self._sized[size]

    def _at(self, size: tuple[int, int]) -> tuple[PersonPixels | None, Tensor]:
        device, people = self.tokens.device, self.amounts.shape[1]
        shown = F.interpolate(self.amounts, size, mode="area").flatten(2)  # [B, S, N]
        amount = shown.sum(dim=1)  # [B, N]
        # Where two people have equal parts of a pixel the first has it, whatever the rounding.
        person = (shown > shown.amax(dim=1, keepdim=True) - EVEN).int().argmax(dim=1)  # [B, N]
        asks = (amount > 0).float()
        most = int(asks.sum(dim=1).max())
        whole = amount.unflatten(1, size).to(device)
        if most == 0:
            return None, whole
        index = None
        if most < amount.shape[1]:
            index = asks.argsort(dim=1, descending=True, stable=True)[:, :most]
            amount, person = amount.gather(1, index), person.gather(1, index)
            index = index.to(device)
        mask = None
        if people > 1:
            each = self.tokens.shape[1] // people
            owner = torch.arange(people).repeat_interleave(each)  # [S * n]
            mask = (person[..., None] == owner).to(device)
        return PersonPixels(index, amount.to(device), mask), whole


class ImageCall:
    """One U-Net call."""

    def __init__(self, run: ImageRun, people: RowsPeople, words: WordReader, prior: Prior):
        self.run, self.people, self.words, self.prior = run, people, words, prior
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
        pixels, amounts = self.people.at(size)
        self.shares[address, attention] = (self.run.strength * amounts).clamp(0.0, 1.0)
        self.pixels += prior.shape[0] * prior.shape[1]
        if pixels is None:
            return prior
        self.asked += pixels.amount.numel()
        expert, projections = self.run.layers[address], self.prior(address)
        factor = (self.run.strength * pixels.amount)[..., None].to(prior)  # [B, K, 1]
        if pixels.index is None:
            return prior + factor * expert(h, self.people.tokens, projections, pixels.mask)
        index = pixels.index[..., None].expand(-1, -1, h.shape[-1])  # [B, K, C]
        delta = factor * expert(h.gather(1, index), self.people.tokens, projections, pixels.mask)
        return prior.scatter_add(1, index, delta)
