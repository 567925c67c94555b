"""The router: per pixel, how much of the prior and how much of the expert (eq. 6)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Router(nn.Module):
    """h [B, N, C] -> R [B, N, 2], a softmax over (prior, expert)."""

    def __init__(self, dim: int, hidden: int, operations: Any = nn, **factory: Any):
        super().__init__()
        self.hidden = operations.Linear(dim, hidden, **factory)
        self.choice = operations.Linear(hidden, 2, **factory)

    def forward(self, h: Tensor) -> Tensor:
        return self.choice(nn.functional.silu(self.hidden(h))).softmax(dim=-1)

    def make_neutral(self) -> None:
        """Start at (1/2, 1/2): with an expert that equals the prior this changes nothing and can learn both ways."""
        nn.init.zeros_(self.choice.weight)
        nn.init.zeros_(self.choice.bias)
