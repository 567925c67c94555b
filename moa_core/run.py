"""One sampling run: whose pixels are whose, what the learned MoA and the adapters make of them.

Both hosts have one of these for every sampling, a call of it for every U-Net call, and send every attention layer
through that. The parts of a run are in learned/, adapters/ and routing/.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .adapters.run import AdapterCall, AdapterRun, Adapters
from .address import Address, BlockShape, Layer
from .attention import Attend, Prior, attend
from .learned.moa import Mixture
from .learned.run import LearnedRun
from .learned.unet_call import UNetCall
from .routing.finished_steps import FinishedSteps
from .routing.word_router import WordReader, WordRouter, read_blocks
from .subjects.rows import Row
from .subjects.subject import Subject


@dataclass(frozen=True, eq=False)
class Places:
    """Who was where in a run: what another one of the same people can go on from."""

    people: tuple
    """See `who`."""
    words: FinishedSteps
    """The word router's."""
    area: FinishedSteps | None
    """The subject area's; None without sparse routing."""
    cut_from: float
    """The noise level at which its opening was over."""

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + (self.area.nbytes if self.area else 0)


def who(subjects: Sequence[Subject]) -> tuple:
    """What tells whether the places found for other subjects are these ones': their words, and who is searched for."""
    return tuple((subject.word, subject.area is None) for subject in subjects)


class Run:
    """Of `pictures` latents (h, w).

    subjects: those that any positive prompt carries. learned: the experts of a MoA file, for those that have no
    adapter; adapters: of those that have. sparse: a learned expert is asked only where its subjects are, from the
    noise level cut_from on.
    """

    def __init__(
        self,
        subjects: Sequence[Subject],
        pictures: int,
        size: tuple[int, int],
        cut_from: float,
        blocks: Mapping[Address, BlockShape],
        strength: float = 1.0,
        sparse: bool = True,
        learned: Mixture | None = None,
        adapters: Adapters | None = None,
        learned_from: float = math.inf,
        call_type: type[UNetCall] = UNetCall,
        numbers: Sequence[int] | None = None,
    ):
        """learned_from: the learned experts act at this noise level and below. call_type: a baseline's, of theirs.
        numbers: of the pictures, where they were taken out of a larger batch.
        """
        own = set() if adapters is None else adapters.subjects.intersection(subjects)
        self.router = WordRouter(subjects, pictures, size, numbers)
        self.adapters = AdapterRun(adapters, self.router, strength, blocks) if own else None
        self.learned = None
        if learned is not None and own != set(subjects):
            self.learned = LearnedRun(learned, pictures, size, cut_from, strength, sparse, call_type)
        self.learned_from = learned_from
        told_apart = len(subjects) > 1 or own
        self.read = frozenset(read_blocks(blocks)) if told_apart else frozenset()
        self.scouting = False
        """While it is, the prior is alone and its words are read."""

    @property
    def wants_scouting(self) -> bool:
        """Whether an adapter would not know in the first step where its subject will be."""
        return self.adapters is not None and self.router.is_blind

    def call(
        self,
        rows: Sequence[Row],
        level: float,
        latents: Tensor,
        context: Tensor,
        timestep: Tensor,
        prior: Prior,
        attend: Attend = attend,
        present: Collection[Subject] | None = None,
        weights: Hashable = None,
    ) -> Call:
        """A U-Net call with latents [B, C, h, w], context [B, T, D] and timestep [B] at this noise level.

        prior: the host's own cross-attentions; attend: its attention. present: subjects of the prompts that are at
        work at this level; None is all. weights: tells apart what the host has made of the prior's weights, where
        that changes in a run. Waits for the device when the level is a new one, and never afterwards.
        """
        self.router.begin(level)
        words = WordReader(self.router, self.read, rows, context.shape[1]) if self.read else None
        if self.scouting:
            return Call(prior, attend, context, words, None, None)
        adapters = learned = None
        if self.adapters is not None:
            there = self.router.subjects if present is None else present
            adapters = self.adapters.call(rows, self.router.last(), latents, context, prior, there, weights)
        if self.learned is not None and level <= self.learned_from:
            taken = None if adapters is None else adapters.share
            learned = self.learned.call(rows, level, latents, context, timestep, attend, taken)
        return Call(prior, attend, context, words, learned, adapters)

    def finish(self, call: Call, rows: Sequence[Row], latents: Tensor) -> None:
        """Note what the call has shown."""
        if call.learned is not None:
            self.learned.finish(call.learned, rows, latents)
        if call.words is not None:
            call.words.note(latents)

    @property
    def places(self) -> Places:
        """Who is where, as the finished steps show it."""
        area = self.learned and self.learned.area
        return Places(who(self.router.subjects), self.router.steps, area and area.steps, area.cut_from if area else 0.0)

    def goes_on_from(self, others: Sequence[tuple[Places, int]]) -> None:
        """Begin each picture with what a run of the same people has found in it; given with its number there."""
        self.router.goes_on_from([(places.words, picture) for places, picture in others])
        areas = [(places.area, picture) for places, picture in others if places.area is not None]
        known = len(areas) == len(others) and all(area.seen[picture].any() for area, picture in areas)
        if known and self.learned and self.learned.area:
            self.learned.area.goes_on_from(areas, min(places.cut_from for places, _ in others))

    def end(self) -> None:
        """Note that the run is over: its last step counts as well."""
        self.router.finish()
        if self.learned and self.learned.area:
            self.learned.area.steps.finish()

    def subject_shares(self) -> Tensor:
        """Every subject's share of every picture [S, P, h, w], as all steps of the run, now over, show it.

        All is a single learned subject's.
        """
        self.end()
        shares = self.router.last()
        return shares if self.read else torch.ones_like(shares)


class Call:
    """One U-Net call."""

    def __init__(
        self,
        prior: Prior,
        attend: Attend,
        context: Tensor,
        words: WordReader | None,
        learned: UNetCall | None,
        adapters: AdapterCall | None,
    ):
        self.prior, self.attend, self.context = prior, attend, context
        self.words, self.learned, self.adapters = words, learned, adapters
        self.shares: dict[Layer, Tensor] = {}
        """The experts' share [B, h, w] of every layer met so far."""
        learning = frozenset() if learned is None else learned.mixture.attentions
        self.attentions = learning | {"attn2"} if self.in_attention else learning
        """The kinds of attention that `mix` has to be called for."""
        self._attended: set[Address] = set()

    @property
    def in_attention(self) -> bool:
        """Whether `attended` has to be called within the prior's cross-attention."""
        return self.words is not None or self.adapters is not None

    def attended(
        self, address: Address, q: Tensor, k: Tensor, prompt: Tensor, size: tuple[int, int], attend: Attend
    ) -> Tensor:
        """What the pixels see in a cross-attention, before its output projection, [B, N, C].

        q, k: the prior's queries [B, N, C] and keys [B, T, C]; prompt: what they see of the prompt; size: (h, w) of
        the layer.
        """
        self._attended.add(address)
        if self.words is not None and self.words.wants(address):
            self.words.read(q, k, self.prior(address).heads, size)
        return prompt if self.adapters is None else self.adapters.attended(address, q, prompt, size, attend)

    def changed(self, name: str, x: Tensor, out: Tensor, size: tuple[int, int]) -> Tensor:
        """out, what the prior's layer of that name made of x, with the deltas of all subjects where they are."""
        return out if self.adapters is None else self.adapters.changed(name, x, out, size)

    def mix(self, address: Address, attention: str, h: Tensor, prior: Tensor, size: tuple[int, int]) -> Tensor:
        """h: what entered the attention; prior: what the host made of it; both [B, N, C]. Returns the mixture.

        size: the layer's (height, width).
        """
        if attention == "attn2" and self.in_attention and address not in self._attended:
            prior = self._attend_beside(address, h, prior, size)
        if self.adapters is not None and attention == "attn2":
            self.shares[address, attention] = self.adapters.effect(size)
        if self.learned is None:
            return prior
        mixed = self.learned.mix(address, attention, h, prior, size)
        share, own = self.learned.shares.get((address, attention)), self.shares.get((address, attention))
        if share is None:
            return mixed
        self.shares[address, attention] = share if own is None else (share + own).clamp(max=1.0)
        return mixed

    def _attend_beside(self, address: Address, h: Tensor, prior: Tensor, size: tuple[int, int]) -> Tensor:
        """As `attended`, where something of somebody else's stands in the place of the prior's attention."""
        own = self.prior(address)
        wanted = self.words is not None and self.words.wants(address)
        if not wanted and not (self.adapters and self.adapters.asks):
            return prior
        q, k = own.to_q(h), own.to_k(self.context)
        prompt = self.attend(q, k, own.to_v(self.context), own.heads) if self.adapters else q
        seen = self.attended(address, q, k, prompt, size, self.attend)
        return prior if seen is prompt else prior + own.out(seen - prompt)
