"""Multi-head attention, and the prior's own projections of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .address import Address

Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""Multi-head attention: q [B, K, C], k and v [B, T, C], number of heads -> [B, K, C]; each host has its own."""


def per_head(x: Tensor, heads: int) -> Tensor:
    """[B, T, C] -> [B, heads, T, C / heads]."""
    return rearrange(x, "b t (heads d) -> b heads t d", heads=heads)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """torch's. mask: bool, broadcast to [B, heads, K, T], True where a query may look."""
    return attend_per_head(q, per_head(k, heads), per_head(v, heads), mask)


def attend_per_head(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """The same with k and v [B, heads, T, C / heads]."""
    out = F.scaled_dot_product_attention(per_head(q, k.shape[1]), k, v, mask)
    return rearrange(out, "b heads n d -> b n (heads d)")


Projection = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PriorAttention:
    """The projections of one of the prior's attention layers. The host's modules: called, never read, so that what
    the host does to their weights (LoRA, fp8, offloading) is kept.
    """

    to_q: Projection
    to_k: Projection
    to_out: Projection
    heads: int

    def out(self, x: Tensor) -> Tensor:
        """W_out x [B, K, C]: without the bias, which the prior's output holds already.

        The bias is what one more pixel, of zeros, gives.
        """
        out = self.to_out(F.pad(x, (0, 0, 0, 1)))  # [B, K + 1, C]
        return out[:, :-1] - out[:, -1:]

    def attention_to(self, h: Tensor, context: Tensor) -> Tensor:
        """Attention weights, averaged over heads: h [B, N, C], context [B, T, D] -> [B, N, T]."""
        q, k = self.to_q(h), self.to_k(context)
        q, k = (per_head(x, self.heads).float() for x in (q, k))
        scores = torch.einsum("bhnd,bhtd->bhnt", q, k) * q.shape[-1] ** -0.5
        return scores.softmax(dim=-1).mean(dim=1)


Prior = Callable[[Address], PriorAttention]
"""The prior's cross-attention at an address."""
