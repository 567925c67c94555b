"""The image expert: the attention to image tokens of an IP-Adapter (Ye et al., 2023), beside the prior's own to text.

It asks with the prior's own query and answers through the prior's own output projection; only keys and values are its
own. So it adds to the prior instead of standing in for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..address import Address, BlockShape

_KINDS = ("input", "output", "middle")


class ImageExpert(nn.Module):
    """Keys and values for the image tokens of one cross-attention. operations: the host's set of layer classes."""

    def __init__(self, dim: int, context_dim: int, operations: Any = nn, **factory: Any):
        super().__init__()
        self.dim, self.context_dim = dim, context_dim
        self.to_k = operations.Linear(context_dim, dim, bias=False, **factory)
        self.to_v = operations.Linear(context_dim, dim, bias=False, **factory)

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Of tokens [B, T, D], both [B, T, C]."""
        return self.to_k(tokens), self.to_v(tokens)


def file_order(blocks: Mapping[Address, BlockShape]) -> list[Address]:
    """The order in which an IP-Adapter file numbers its layers: the encoder's, the decoder's, the middle's."""
    return sorted(blocks, key=lambda address: (_KINDS.index(address.kind), address.block, address.index))


class ImageMixture(nn.Module):
    """One image expert for each cross-attention, in the file's order, and the tokens of a row without a picture."""

    def __init__(self, shapes: Sequence[BlockShape], tokens: int, operations: Any = nn, **factory: Any):
        """tokens: how many a picture has."""
        super().__init__()
        self.shapes, self.tokens = list(shapes), tokens
        self.layers = nn.ModuleList(ImageExpert(s.dim, s.context_dim, operations, **factory) for s in shapes)
        self.negative = torch.zeros(tokens, shapes[0].context_dim)
        """[n, D] on the CPU."""

    @property
    def feature_dim(self) -> int:
        """Width of a subject's feature: its tokens [n, D] in one row."""
        return self.negative.numel()

    def fits(self, blocks: Mapping[Address, BlockShape]) -> bool:
        """Whether these are the blocks of a U-Net it was made for."""
        return self.shapes == [blocks[address] for address in file_order(blocks)]
