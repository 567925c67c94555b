"""The image expert: the attention to image tokens of an IP-Adapter (Ye et al., 2023), beside the prior's own to text.

It asks with the prior's own query and answers through the prior's own output projection; only keys and values are its
own. So it adds to the prior instead of standing in for it: mixed = prior + strength * share * delta.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .address import Address
from .expert import attend_per_head, per_head

Projection = Callable[[Tensor], Tensor]
KeysValues = tuple[Tensor, Tensor]
"""Both [B, heads, T, C / heads]."""


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


class ImageExpert(nn.Module):
    """Keys and values for the image tokens of one cross-attention. operations: the host's set of layer classes."""

    def __init__(self, dim: int, context_dim: int, operations: Any = nn, **factory: Any):
        super().__init__()
        self.dim, self.context_dim = dim, context_dim
        self.to_k = operations.Linear(context_dim, dim, bias=False, **factory)
        self.to_v = operations.Linear(context_dim, dim, bias=False, **factory)

    def keys_values(self, tokens: Tensor, heads: int) -> KeysValues:
        """Of tokens [B, T, D]: they are the same in every step."""
        return per_head(self.to_k(tokens), heads), per_head(self.to_v(tokens), heads)

    def forward(self, h: Tensor, keys_values: KeysValues, prior: PriorAttention, mask: Tensor | None = None) -> Tensor:
        """delta [B, K, C] of pixels h [B, K, C] that attend to T tokens.

        mask: bool [B, K, T], which tokens a pixel may see; None is all of them.
        """
        seen = None if mask is None else mask[:, None]
        return prior.out(attend_per_head(prior.to_q(h), *keys_values, seen))
