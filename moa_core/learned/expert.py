"""The expert: the personalized attention that stands beside the prior one (Section 3.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..attention import Attend, attend, per_head


class Expert(nn.Module):
    """Multi-head attention with the layout and the weight names of the prior attention it is copied from.

    `operations` is the host's set of layer classes (torch.nn in training).
    """

    def __init__(self, dim: int, context_dim: int, heads: int, operations: Any = nn, **factory: Any):
        super().__init__()
        self.heads = heads
        self.to_q = operations.Linear(dim, dim, bias=False, **factory)
        self.to_k = operations.Linear(context_dim, dim, bias=False, **factory)
        self.to_v = operations.Linear(context_dim, dim, bias=False, **factory)
        self.to_out = nn.ModuleList([operations.Linear(dim, dim, **factory)])

    def forward(self, h: Tensor, context: Tensor, attend: Attend = attend) -> Tensor:
        """h [B, N, C] asks, context [B, T, D] answers -> [B, N, C]; attend: the host's."""
        return self.to_out[0](attend(self.to_q(h), self.to_k(context), self.to_v(context), self.heads))

    def attention_to(self, h: Tensor, context: Tensor) -> Tensor:
        """Attention weights, averaged over heads: h [B, N, C], context [B, T, D] -> [B, N, T].

        Costs the whole map; the object loss (eq. 12) needs it, sampling does not.
        """
        q, k = self.to_q(h), self.to_k(context)
        q, k = (per_head(x, self.heads) for x in (q, k))
        scores = torch.einsum("bhnd,bhtd->bhnt", q, k) * q.shape[-1] ** -0.5
        return scores.softmax(dim=-1).mean(dim=1)
