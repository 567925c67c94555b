"""One MoA layer: an expert, a router, and their mixing with the prior's output (eq. 6, 7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import Attend, attend
from ..routing.subject_area import Pixels
from .expert import Expert
from .router import Router


@dataclass
class Mixed:
    """What one MoA layer gives back."""

    out: Tensor
    """[B, N, C]: the mixed attention output."""
    share: Tensor
    """[B, N]: the expert's share R1 of every pixel, after strength; 0 where it was not asked."""
    wanted: Tensor
    """[B, N]: the share that the router wanted, asked or not."""


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

    def dense(
        self,
        h: Tensor,
        prior: Tensor,
        context: Tensor | None = None,
        strength: float = 1.0,
        attend: Attend = attend,
        left: Tensor | None = None,
    ) -> Mixed:
        """Every pixel through the expert. context [B, T, D]; None for self-attention. attend: the host's attention.

        left: how much of each pixel there is to have, [B, N]; None: all.
        """
        wanted = self._share(h, strength)
        share = wanted if left is None else wanted * left.to(wanted)
        expert = self.expert(h, h if context is None else context, attend)
        return Mixed(torch.lerp(prior, expert, share[..., None].to(prior)), share, wanted)

    def sparse(
        self,
        h: Tensor,
        prior: Tensor,
        pixels: Pixels,
        context: Tensor | None = None,
        strength: float = 1.0,
        attend: Attend = attend,
        left: Tensor | None = None,
    ) -> Mixed:
        """Only these pixels ask the expert, all of them answer; everywhere else the prior's output stands."""
        wanted = self._share(h, strength)
        if pixels.index.shape[1] == 0:
            return Mixed(prior, torch.zeros_like(wanted), wanted)
        have = wanted if left is None else wanted * left.to(wanted)
        share = have.gather(1, pixels.index) * pixels.inside.to(wanted)  # [B, K]
        index = pixels.index[..., None].expand(-1, -1, h.shape[-1])  # [B, K, C]
        expert = self.expert(h.gather(1, index), h if context is None else context, attend)
        mixed = torch.lerp(prior.gather(1, index), expert, share[..., None].to(prior))
        asked = torch.zeros_like(wanted).scatter(1, pixels.index, share)
        return Mixed(prior.scatter(1, index, mixed), asked, wanted)

    def _share(self, h: Tensor, strength: float) -> Tensor:
        """R1' = clamp(strength * R1, 0, 1), [B, N]; the prior's share is the rest."""
        return (self.router(h)[..., 1] * strength).clamp(0.0, 1.0)
