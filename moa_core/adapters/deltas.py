"""Deltas: changes of the prior's own layers, each added to its layer's output where its subject is and nowhere else.

y = W x + sum over parts of amount * delta(x). A part is one file of one subject; its amount at a token is the subject's
share there. Of all low-rank parts of a layer there are one thin matrix down, the product with the amounts, one up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEXT_LAYERS = ("attn2.to_k", "attn2.to_v")
"""What reads the text and not the picture: the ends of such layers' names, in both hosts."""


Ranks = tuple[tuple[int, int], ...]
"""(number of a part, how many columns it has) one after the other."""


class Amounts:
    """How much of every part's delta each token gets."""

    def __init__(self, parts: Tensor):
        """parts: [B, P, N], or [B, P, h, w] of a picture."""
        self.parts = parts
        self._by_ranks: dict[tuple[Ranks, bool], Tensor] = {}

    def of_ranks(self, ranks: Ranks, is_convolution: bool) -> Tensor:
        """For columns of these parts [B, R, h, w] or, of tokens, [B, N, R]; one for all of a single part's."""
        key = ranks, is_convolution
        if key not in self._by_ranks:
            columns = ranks if len(ranks) > 1 else [(part, 1) for part, _ in ranks]
            picked = self.parts[:, [part for part, rank in columns for _ in range(rank)]]  # [B, R, ...]
            self._by_ranks[key] = picked if is_convolution else picked.flatten(2).mT.contiguous()
        return self._by_ranks[key]


@dataclass(frozen=True)
class LowRank:
    """delta(x) = up down x. up [out, r], down [r, in] or, of a convolution, [r, in, k, k]; scales are in up."""

    up: Tensor
    down: Tensor


@dataclass(frozen=True)
class Difference:
    """delta(x) = weight x + bias, of the layer's own shapes; None where it does not change."""

    weight: Tensor | None = None
    bias: Tensor | None = None


Change = LowRank | Difference


class LayerDeltas(nn.Module):
    """What all parts change in one of the prior's layers, a Linear or a Conv2d."""

    def __init__(self, layer: nn.Module, changes: Mapping[int, Change], operations: Any = nn):
        """layer: the prior's, for its shape; changes: by the number of the part."""
        super().__init__()
        low = {part: change for part, change in changes.items() if isinstance(change, LowRank)}
        self.ranks = tuple((part, len(change.down)) for part, change in low.items())
        self.wholes = tuple(part for part, change in changes.items() if isinstance(change, Difference))
        self.is_convolution = isinstance(layer, nn.Conv2d)
        self.down = self.up = None
        if low:
            down = torch.cat([change.down for change in low.values()])  # [R, in, ...]
            up = torch.cat([change.up for change in low.values()], dim=1)  # [out, R]
            self.down = _shaped_as(layer, operations, down)
            self.up = _filled(operations.Linear(len(down), len(up), bias=False, device="meta"), up)
        self.whole = nn.ModuleList(_whole(layer, operations, changes[part]) for part in self.wholes)

    def forward(self, x: Tensor, out: Tensor, amounts: Amounts) -> Tensor:
        """out, what the layer made of x, with the deltas added: [B, N, out], or of a convolution [B, out, h, w]."""
        if self.down is not None:
            amount = amounts.of_ranks(self.ranks, self.is_convolution)  # [B, N, R] or [B, R, h, w]
            ready = _is_ready(self.down.weight, x) and _is_ready(self.up.weight, out)
            out = (self._add_ready if ready else self._add)(x, out, amount)
        for part, whole in zip(self.wholes, self.whole, strict=True):
            out = torch.addcmul(out, whole(x), amounts.of_ranks(((part, 1),), self.is_convolution))
        return out

    def _add_ready(self, x: Tensor, out: Tensor, amount: Tensor) -> Tensor:
        """Three calls, without the layers around the weights: on a GPU each layer of Python takes as long as a call."""
        if self.is_convolution:
            thin = self.down._conv_forward(x, self.down.weight, None) * amount  # [B, R, h, w]
            up = self.up.weight.expand(len(out), -1, -1)
            return torch.baddbmm(out.flatten(2), up, thin.flatten(2)).view(out.shape)
        thin = F.linear(x, self.down.weight) * amount  # [B, N, R]
        return torch.addmm(out.flatten(0, -2), thin.flatten(0, -2), self.up.weight.T).view(out.shape)

    def _add(self, x: Tensor, out: Tensor, amount: Tensor) -> Tensor:
        """By the host's layers, which bring the weights here and into the right precision."""
        thin = self.down(x) * amount
        return out + (self.up(thin.movedim(1, -1)).movedim(-1, 1) if self.is_convolution else self.up(thin))


def _is_ready(weight: Tensor, x: Tensor) -> bool:
    return weight.dtype == x.dtype and weight.device == x.device


class Deltas(nn.Module):
    """All parts' changes of all layers of one U-Net, by the host's names of the layers."""

    def __init__(self, layers: Mapping[str, LayerDeltas], parts: int):
        super().__init__()
        self.parts, self._index = parts, {name: number for number, name in enumerate(layers)}
        self.layers = nn.ModuleList(layers.values())

    def of(self, name: str) -> LayerDeltas | None:
        """What is changed in the layer of that name, if anything."""
        number = self._index.get(name)
        return None if number is None else self.layers[number]

    @property
    def in_the_picture(self) -> list[str]:
        """Names of the layers that read the picture."""
        return [name for name in self._index if not name.endswith(TEXT_LAYERS)]


def deltas_of(network: nn.Module, files: Sequence[Mapping[str, Change]], operations: Any = nn) -> Deltas:
    """Of files' changes by the names of a network's layers: the n-th file is the n-th part."""
    layers: dict[str, dict[int, Change]] = {}
    for part, changes in enumerate(files):
        for name, change in changes.items():
            layers.setdefault(name, {})[part] = change
    built = {name: LayerDeltas(network.get_submodule(name), parts, operations) for name, parts in layers.items()}
    return Deltas(built, len(files)).eval()


def _shaped_as(layer: nn.Module, operations: Any, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    """A layer of the host's that moves over its input as this one does, with these weights."""
    if isinstance(layer, nn.Conv2d):
        moves = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "groups": layer.groups}
        channels = layer.in_channels, len(weight)
        made = operations.Conv2d(*channels, weight.shape[2:], **moves, bias=bias is not None, device="meta")
    else:
        made = operations.Linear(weight.shape[1], len(weight), bias=bias is not None, device="meta")
    return _filled(made, weight, bias)


def _whole(layer: nn.Module, operations: Any, change: Difference) -> nn.Module:
    weight = change.weight
    if weight is None:
        weight = torch.zeros(layer.weight.shape, dtype=change.bias.dtype)
    return _shaped_as(layer, operations, weight, change.bias)


def _filled(layer: nn.Module, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.contiguous(), requires_grad=False)
    return layer
