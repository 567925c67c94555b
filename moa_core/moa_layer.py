"""One MoA layer: an expert, a router, and their mixing with the prior's output (eq. 6, 7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .expert import Expert
from .router import Router

SPARSE_THRESHOLD = 0.02
"""Pixels whose expert share is at most this keep the prior's output in sparse routing.

The mixed output differs from the dense one by at most SPARSE_THRESHOLD * |expert - prior| at such a
pixel and is the same everywhere else.
"""


@dataclass
class Mixed:
    """What one MoA layer gives back."""

    out: Tensor
    """[B, N, C]: the mixed attention output."""
    share: Tensor
    """[B, N]: the expert's share R1 of every pixel, after strength."""
    chosen: Tensor | None = None
    """[] (on the device): most pixels above the threshold in any row; sparse routing only."""


class MoALayer(nn.Module):
    """Never computes the prior: the host does, and hands over what came out.

    h is the normalized hidden state that enters the attention, [B, N, C].
    """

    def __init__(
        self, dim: int, context_dim: int, heads: int, router_hidden: int, operations: Any = nn, **factory: Any
    ):
        super().__init__()
        self.expert = Expert(dim, context_dim, heads, operations, **factory)
        self.router = Router(dim, router_hidden, operations, **factory)

    def dense(self, h: Tensor, prior: Tensor, context: Tensor | None = None, strength: float = 1.0) -> Mixed:
        """Every pixel through the expert. context [B, T, D]; None for self-attention."""
        share = self._share(h, strength)
        expert = self.expert(h, h if context is None else context)
        return Mixed(torch.lerp(prior, expert, share[..., None].to(prior)), share)

    def sparse(
        self,
        h: Tensor,
        prior: Tensor,
        context: Tensor | None = None,
        strength: float = 1.0,
        capacity: int | None = None,
    ) -> Mixed:
        """Only the pixels that the router gives to the expert ask; all of them still answer.

        capacity: how many pixels of a row the expert computes, those with the largest share first. None
        reads the number needed off the device: exact, and free on a CPU; elsewhere it would make the
        host wait for the device at every layer, so there `SparsePlan` foretells it.
        """
        share = self._share(h, strength)
        above = share > SPARSE_THRESHOLD
        share = share.where(above, 0.0)
        chosen = above.sum(dim=1).max()
        count = int(chosen) if capacity is None else min(capacity, h.shape[1])
        if count == 0:
            return Mixed(prior, share, chosen)
        weight, index = share.topk(count, dim=1, sorted=False)  # [B, K]: the K pixels with the largest share
        index = index[..., None].expand(-1, -1, h.shape[-1])  # [B, K, C]
        expert = self.expert(h.gather(1, index), h if context is None else context)
        mixed = torch.lerp(prior.gather(1, index), expert, weight[..., None].to(prior))
        return Mixed(prior.scatter(1, index, mixed), share, chosen)

    def _share(self, h: Tensor, strength: float) -> Tensor:
        """R1' = clamp(strength * R1, 0, 1), [B, N]; the prior's share is the rest."""
        return (self.router(h)[..., 1] * strength).clamp(0.0, 1.0)


class SparsePlan:
    """How many pixels each layer may compute in the next U-Net call, foretold from the last ones.

    For devices that run behind the host: the number of chosen pixels is read once per call, not once per
    layer. A call whose layers chose more than foretold was cut short and must be run again, dense.
    """

    MARGIN = 1.25
    ROUND = 64

    def __init__(self) -> None:
        self._capacity: dict[tuple, int] = {}

    def capacity(self, layer: tuple, pixels: int) -> int:
        return min(self._capacity.get(layer, pixels), pixels)

    def settle(self, chosen: dict[tuple, Tensor]) -> bool:
        """Learn from a finished call; True when every chosen pixel was computed. Waits for the device once."""
        if not chosen:
            return True
        counts = torch.stack(list(chosen.values())).tolist()
        held = all(count <= self._capacity.get(layer, count) for layer, count in zip(chosen, counts, strict=True))
        for layer, count in zip(chosen, counts, strict=True):
            wanted = -(-int(count * self.MARGIN) // self.ROUND) * self.ROUND
            # Positive and negative prompts may come in separate calls: fall slowly, rise at once.
            self._capacity[layer] = max(wanted, int(0.9 * self._capacity.get(layer, 0)))
        return held
