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

    name: str
    """The host's, of the layer in its U-Net."""
    to_q: Projection
    to_k: Projection
    to_v: Projection
    to_out: Projection
    heads: int

    def out(self, x: Tensor) -> Tensor:
        """W_out x [B, N, C]: without the bias, which is what the output of nothing is."""
        return self.to_out(x) - self.to_out(torch.zeros_like(x[:, :1]))


def attention_map(q: Tensor, k: Tensor, heads: int) -> Tensor:
    """Attention weights, averaged over heads: q [B, N, C], k [B, T, C] -> [B, N, T]."""
    q, k = (per_head(x, heads).float() for x in (q, k))
    scores = torch.einsum("bhnd,bhtd->bhnt", q, k) * q.shape[-1] ** -0.5
    return scores.softmax(dim=-1).mean(dim=1)


Prior = Callable[[Address], PriorAttention]
"""The prior's cross-attention at an address."""
