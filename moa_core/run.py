"""One sampling run: whose pixels are whose, what the learned MoA and the adapters make of them.

Both hosts have one of these for every sampling, a call of it for every U-Net call, and send every attention layer
through that. The parts of a run are in learned/, adapters/ and routing/.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping, Sequence

import torch
from torch import Tensor

from .adapters.run import AdapterCall, AdapterRun, Adapters
from .address import Address, BlockShape, Layer
from .attention import Attend, Prior, attend
from .learned.moa import Mixture
from .learned.run import LearnedRun
from .learned.unet_call import UNetCall
from .routing.word_router import WordReader, WordRouter, read_blocks
from .subjects.rows import Row
from .subjects.subject import Subject


class Run:
    """Of `pictures` latents (h, w); levels: the noise level of every step with MoA at work.

    subjects: those that any positive prompt carries. learned: the experts of a MoA file, for those that have no
    adapter; adapters: of those that have. sparse: a learned expert is asked only where its subjects are.
    """

    def __init__(
        self,
        subjects: Sequence[Subject],
        pictures: int,
        size: tuple[int, int],
        levels: Sequence[float],
        blocks: Mapping[Address, BlockShape],
        strength: float = 1.0,
        sparse: bool = True,
        learned: Mixture | None = None,
        adapters: Adapters | None = None,
        learned_from: float = math.inf,
        call_type: type[UNetCall] = UNetCall,
    ):
        """learned_from: the learned experts act at this noise level and below. call_type: a baseline's, of theirs."""
        own = set() if adapters is None else adapters.subjects.intersection(subjects)
        self.router = WordRouter(subjects, pictures, size)
        self.adapters = AdapterRun(adapters, self.router, strength, blocks) if own else None
        self.learned = None
        if learned is not None and own != set(subjects):
            acting = [level for level in levels if level <= learned_from]
            self.learned = LearnedRun(learned, pictures, size, acting, strength, sparse, call_type)
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

    def subject_shares(self) -> Tensor:
        """Every subject's share of every picture [S, P, h, w], as all steps of the run, now over, show it.

        All is a single learned subject's.
        """
        self.router.finish()
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
