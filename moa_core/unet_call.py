"""One U-Net call: what the MoA layers need to know besides h and the prior's output.

Both hosts make one of these per call and send every attention layer through `mix`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .address import Address
from .moa import Mixture
from .moa_layer import SparsePlan


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

    strength multiplies the expert's share. sparse: None routes densely, True reads the number of chosen
    pixels at every layer (right on a CPU), a SparsePlan foretells it (right on an accelerator).
    """

    def __init__(
        self,
        mixture: Mixture,
        context: Tensor,
        timestep: Tensor,
        bound: BoundTokens | None = None,
        strength: float = 1.0,
        sparse: SparsePlan | bool | None = None,
    ):
        self.mixture, self.context, self.strength, self.sparse = mixture, context, strength, sparse
        self.shares: dict[tuple[Address, str], Tensor] = {}
        """The expert's share [B, N] of every layer met so far."""
        self._chosen: dict[tuple, Tensor] = {}
        self._prompts: dict[Address, Tensor] = {}
        if bound is not None:
            rows, positions = bound.rows.to(context.device), bound.positions.to(context.device)
            features = bound.features.to(context)
            text = context[rows, positions]  # [K, D]
            replaced = mixture.subject_prompt(features, text, timestep.to(context.device)[rows])  # [L, K, D]
            self._where = (rows, positions)
            self._prompts = dict(zip(mixture.config.blocks, replaced, strict=True))

    def subject_prompt(self, address: Address) -> Tensor:
        """The context of one block's cross-attention [B, T, D], bound tokens replaced."""
        if address not in self._prompts:
            return self.context
        return self.context.index_put(self._where, self._prompts[address])

    def mix(self, address: Address, attention: str, h: Tensor, prior: Tensor) -> Tensor:
        """h: what entered the attention; prior: what the host made of it; both [B, N, C]. Returns the mixture."""
        layer = self.mixture.layer(address, attention)
        context = self.subject_prompt(address) if attention == "attn2" else None
        if self.sparse is None:
            mixed = layer.dense(h, prior, context, self.strength)
        elif self.sparse is True:
            mixed = layer.sparse(h, prior, context, self.strength)
        else:
            place = (address, attention, h.shape[1])
            capacity = self.sparse.capacity(place, h.shape[1])
            mixed = layer.sparse(h, prior, context, self.strength, capacity)
            self._chosen[place] = mixed.chosen
        self.shares[address, attention] = mixed.share
        return mixed.out

    def complete(self) -> bool:
        """After the call: False when a SparsePlan foretold too few pixels, and it must be run again, densely."""
        return not isinstance(self.sparse, SparsePlan) or self.sparse.settle(self._chosen)
