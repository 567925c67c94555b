"""The expert: the personalized attention that stands beside the prior one (Section 3.2)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..attention import Attend, attend, attention_map


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
        return attention_map(self.to_q(h), self.to_k(context), self.heads)
