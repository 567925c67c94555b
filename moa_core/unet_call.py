"""One U-Net call: what the MoA layers need to know besides h and the prior's output.

Both hosts make one of these per call and send every attention layer through `mix`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .address import Address
from .expert import Attend, attend
from .moa import Mixture
from .subject_area import RowsArea


@dataclass
class BoundTokens:
    """The K bound tokens of a call: features [K, F] at context[rows, positions], rows and positions [K]."""

    rows: Tensor
    positions: Tensor
    features: Tensor

    @classmethod
    def stack(cls, tokens: Sequence[tuple[int, int, Tensor]]) -> BoundTokens | None:
        """From (row, position, feature [F]) of every token; None when there is none."""
        if not tokens:
            return None
        rows, positions, features = zip(*tokens, strict=True)
        return cls(torch.tensor(rows), torch.tensor(positions), torch.stack(features))


class UNetCall:
    """context [B, T, D] and timestep [B] are the U-Net's own inputs of this call.

    strength multiplies the expert's share. area: where its rows may ask the expert (sparse routing); None is
    everywhere. attend: the host's attention.
    """

    def __init__(
        self,
        mixture: Mixture,
        context: Tensor,
        timestep: Tensor,
        bound: BoundTokens | None = None,
        strength: float = 1.0,
        area: RowsArea | None = None,
        attend: Attend = attend,
    ):
        self.mixture, self.context, self.strength, self.area, self.attend = mixture, context, strength, area, attend
        self.shares: dict[tuple[Address, str], Tensor] = {}
        """The expert's share [B, h, w] of every layer met so far."""
        self.wanted: dict[tuple[Address, str], Tensor] = {}
        """The share that the routers wanted: not 0 outside the area."""
        self.pixels, self.asked = 0, 0
        """Pixels of all layers met so far, and those of them that went through the expert."""
        self.bound = None
        """The bound tokens, on the context's device."""
        self._prompts: dict[Address, Tensor] = {}
        if bound is not None:
            rows, positions = bound.rows.to(context.device), bound.positions.to(context.device)
            self.bound = BoundTokens(rows, positions, bound.features.to(context))
            text = context[rows, positions]  # [K, D]
            steps = timestep.to(context.device)[rows]
            replaced = mixture.subject_prompt(self.bound.features, text, steps)  # [L, K, D]
            self._prompts = dict(zip(mixture.config.blocks, replaced, strict=True))

    def subject_prompt(self, address: Address) -> Tensor:
        """The context of one block's cross-attention [B, T, D], bound tokens replaced."""
        if self.bound is None:
            return self.context
        return self.context.index_put((self.bound.rows, self.bound.positions), self._prompts[address])

    def mix(self, address: Address, attention: str, h: Tensor, prior: Tensor, size: tuple[int, int]) -> Tensor:
        """h: what entered the attention; prior: what the host made of it; both [B, N, C]. Returns the mixture.

        size: the layer's (height, width).
        """
        layer = self.mixture.layer(address, attention)
        context = self.subject_prompt(address) if attention == "attn2" else None
        pixels = self.area and self.area.pixels(size)
        if pixels is None:
            mixed = layer.dense(h, prior, context, self.strength, self.attend)
        else:
            mixed = layer.sparse(h, prior, pixels, context, self.strength, self.attend)
        self.pixels += prior.shape[0] * prior.shape[1]
        self.asked += prior.shape[0] * (prior.shape[1] if pixels is None else pixels.index.shape[1])
        self.shares[address, attention] = mixed.share.unflatten(1, size)
        self.wanted[address, attention] = mixed.wanted.unflatten(1, size)
        return mixed.out
