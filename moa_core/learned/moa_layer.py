"""One MoA layer: an expert, a router, and their mixing with the prior's output (eq. 6, 7)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import Attend, attend
from ..routing.subject_area import Pixels
from .expert import Expert
from .router import Router

GATHERED_FROM = {"cpu": 2**15}
"""Pixels times width of a layer from which on it pays to gather those that ask, by kind of device. On a CPU (one
thread, a quarter of the pixels) self-attention took 1.3 of the time at 144 x 128, 0.6 at 576 x 64, 0.3 at 4096 x 320.
"""
GATHERED_ELSEWHERE = 2**20
"""For GPUs, where it is not measured: there the calls cost more than the arithmetic of anything smaller."""


@dataclass
class Mixed:
    """What one MoA layer gives back."""

    out: Tensor
    """[B, N, C]: the mixed attention output."""
    share: Tensor
    """[B, N]: the expert's share R1 of every pixel, after strength; 0 where it was not asked."""
    wanted: Tensor
    """[B, N]: the share that the router wanted, asked or not."""


@dataclass
class Projected:
    """What a layer makes of its inputs before any attention."""

    q: Tensor
    """[B, N, C]: the expert's queries."""
    k: Tensor
    """[B, T, C]: its keys; T = N in self-attention."""
    v: Tensor
    share: Tensor
    """[B, N]: R1, what the router gives the expert."""


class MixingLayer(nn.Module, ABC):
    """Never computes the prior: the host does, and hands over what came out.

    h is the normalized hidden state that enters the attention, [B, N, C].
    """

    heads: int

    @abstractmethod
    def project(self, h: Tensor, context: Tensor | None) -> Projected:
        """context [B, T, D]; None for self-attention."""

    @abstractmethod
    def answer(self, seen: Tensor) -> Tensor:
        """The expert's output projection of what its queries have seen, [B, K, C]."""

    def forward(
        self,
        h: Tensor,
        prior: Tensor,
        context: Tensor | None = None,
        pixels: Pixels | None = None,
        strength: float = 1.0,
        attend: Attend = attend,
        left: Tensor | None = None,
    ) -> Mixed:
        """pixels: those that ask the expert, all of them answer; elsewhere the prior's output stands. None: all ask.

        attend: the host's attention. left: how much of each pixel there is to have, [B, N]; None: all.
        """
        asked = self.project(h, context)
        wanted = asked.share if strength == 1.0 else (asked.share * strength).clamp(0.0, 1.0)  # R1'
        share = wanted if left is None else wanted * left.to(wanted)
        if pixels is None:
            return Mixed(self._mixed(asked, prior, share, attend), share, wanted)
        share = share * pixels.mask.to(share)
        index = pixels.index[..., None].expand(-1, -1, h.shape[-1])  # [B, K, C]
        if index.shape[1] == 0:
            return Mixed(prior, share, wanted)
        if not gathering_pays(h):
            return Mixed(self._mixed(asked, prior, share, attend), share, wanted)
        asked.q = asked.q.gather(1, index)
        mixed = self._mixed(asked, prior.gather(1, index), share.gather(1, pixels.index), attend)
        return Mixed(prior.scatter(1, index, mixed), share, wanted)

    def _mixed(self, asked: Projected, prior: Tensor, share: Tensor, attend: Attend) -> Tensor:
        """Of K queries, [B, K, C]: prior [B, K, C], share [B, K]."""
        expert = self.answer(attend(asked.q, asked.k, asked.v, self.heads))
        return torch.lerp(prior, expert, share[..., None].to(prior))


def gathering_pays(h: Tensor) -> bool:
    """Whether a layer of h [B, N, C] is faster with the pixels that ask alone than with zero shares for the others."""
    return h.shape[1] * h.shape[2] >= GATHERED_FROM.get(h.device.type, GATHERED_ELSEWHERE)


class MoALayer(MixingLayer):
    """Expert and router as the paper and the file have them: what is trained."""

    def __init__(
        self, dim: int, context_dim: int | None, heads: int, router_hidden: int, operations: Any = nn, **factory: Any
    ):
        """context_dim: the text's width; None for self-attention."""
        super().__init__()
        self.heads = heads
        self.expert = Expert(dim, context_dim or dim, heads, operations, **factory)
        self.router = Router(dim, router_hidden, operations, **factory)

    def project(self, h: Tensor, context: Tensor | None) -> Projected:
        seen = h if context is None else context
        return Projected(self.expert.to_q(h), self.expert.to_k(seen), self.expert.to_v(seen), self.router(h)[..., 1])

    def answer(self, seen: Tensor) -> Tensor:
        return self.expert.to_out[0](seen)
