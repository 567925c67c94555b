"""The subject area: where the subjects of a picture are, read off its routers while it is sampled.

Sparse routing spends the expert only there. A router's share alone does not say where that is: routers stay soft, and
those that the router loss leaves out stay open everywhere. Their mean over the routed blocks and the steps so far does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..address import Address, Layer
from ..subjects.view import View
from .finished_steps import FinishedSteps

OPENING = 0.25
"""Part of the timesteps, at the beginning, in which nothing is cut: the subjects have not found their places yet."""
CONTRAST = 0.05
"""Shares that differ by less than this over a picture tell nothing apart."""


def routed_blocks(addresses: list[Address]) -> list[Address]:
    """The blocks whose routers are taught where the subjects are (eq. 9).

    The paper leaves out the first two and the last three of SD 1.5's sixteen; of another U-Net, the same shares.
    """
    count = len(addresses)
    return addresses[round(count * 2 / 16) : count - round(count * 3 / 16)]


def routed_layers(layers: Collection[Layer], blocks: Iterable[Address]) -> list[Layer]:
    """Of these layers those in routed blocks; all, where none is. blocks: the U-Net's, in order."""
    routed = routed_blocks(list(blocks))
    return [layer for layer in layers if layer[0] in routed] or list(layers)


def mean_share(shares: Mapping[Layer, Tensor], size: tuple[int, int], blocks: Iterable[Address]) -> Tensor:
    """The expert's mean share over the routed layers: each [B, h', w'] -> [B, h, w] of that size.

    blocks: the U-Net's, in order.
    """
    by_size: dict[torch.Size, list[Tensor]] = {}
    for layer in routed_layers(shares, blocks):
        by_size.setdefault(shares[layer].shape, []).append(shares[layer])
    sums = [torch.stack(layers, dim=1).float().sum(dim=1, keepdim=True) for layers in by_size.values()]
    sized = [F.interpolate(each, size, mode="bilinear", align_corners=False) for each in sums]
    return torch.cat(sized, dim=1).sum(dim=1) / sum(map(len, by_size.values()))


def between_classes(values: np.ndarray) -> float | None:
    """The least value in 0..1 of the upper of two classes, parted where they differ most (Otsu); None for one class."""
    values = values.clip(0.0, 1.0)
    if values.max() - values.min() < CONTRAST:
        return None
    counts, _ = np.histogram(values, 256, (0.0, 1.0))
    centres = (np.arange(256) + 0.5) / 256
    below = counts.cumsum()
    above = below[-1] - below
    sums = (counts * centres).cumsum()
    between = below * above * (sums / below.clip(1) - (sums[-1] - sums) / above.clip(1)) ** 2
    return (int(between.argmax()) + 1) / 256


def two_classes(shares: Tensor) -> Tensor:
    """A mask [H, W] of 0 and 1 from shares in 0..1; all or nothing where they are one class."""
    cut = between_classes(shares.numpy())
    return torch.full_like(shares, float(shares.mean() > 0.75)) if cut is None else (shares >= cut).float()


def opening_end(first: float, last: float = 0.0) -> float:
    """The timestep at which the opening of a sampling from timestep `first` to `last` is over.

    By timesteps and not by steps, as a sampling may be cut into runs of which none knows the others' steps; half a
    timestep early, so that no rounding of a step's timestep decides.
    """
    return first - OPENING * (first - last) + 0.5


@dataclass(frozen=True)
class Pixels:
    """Those of a layer's pixels that ask the expert. Rows with fewer than K are filled up with others."""

    index: Tensor
    """[B, K]"""
    mask: Tensor
    """[B, N]: 1 in the subject area."""


@dataclass
class RowsArea:
    """The subject area as the rows of one U-Net call show it."""

    area: np.ndarray
    """bool [B, h, w]."""
    device: torch.device
    _pixels: dict[tuple[int, int], Pixels | None] = field(default_factory=dict)

    def pixels(self, size: tuple[int, int]) -> Pixels | None:
        """The pixels of a layer of (h, w) that see any of the area; None where all do in all rows."""
        if size not in self._pixels:
            area = torch.from_numpy(self.area.astype(np.float32))
            chosen = F.adaptive_max_pool2d(area, size).flatten(1)  # [B, N]
            counts = chosen.numpy().sum(axis=1)
            if counts.min() == chosen.shape[1]:
                self._pixels[size] = None
            else:
                index = (-chosen.numpy()).argsort(axis=1, kind="stable")[:, : int(counts.max())]
                self._pixels[size] = Pixels(torch.from_numpy(index).to(self.device), chosen.to(self.device))
        return self._pixels[size]


class SubjectArea:
    """The subject area of every picture of one sampling run, as its finished steps show it."""

    def __init__(self, pictures: int, size: tuple[int, int], cut_from: float, blocks: Iterable[Address]):
        """size: (h, w) of the latents; cut_from: the noise level (sigma or timestep) at which the opening is over;
        blocks: the U-Net's, in order.
        """
        self.size, self.pictures, self.blocks = size, pictures, list(blocks)
        self.cut_from = cut_from
        self.steps = FinishedSteps(pictures, size)
        self._area: np.ndarray | None = None
        self._rows: dict[tuple, RowsArea] = {}
        self._sizes: dict[torch.Size, set[tuple[int, int]]] = {}  # of the layers that calls of that size meet

    def at(self, level: float, views: Sequence[View], like: Tensor) -> RowsArea | None:
        """Where the rows like [B, C, h, w] of a call at this level may ask the expert; None: everywhere."""
        if self.steps.begin(level):
            self._find()
        if self._area is None or level > self.cut_from or not all(self._holds(view, like) for view in views):
            return None
        key = (tuple(views), like.shape)
        if key not in self._rows:
            shown = np.stack([self._area[view.within(self.size)] for view in views])
            rows = self._rows[key] = RowsArea(shown, like.device)
            for size in self._sizes.get(like.shape[2:], ()):
                rows.pixels(size)
        return self._rows[key]

    def add(self, shares: Mapping[Layer, Tensor], views: Mapping[int, View], like: Tensor) -> None:
        """Note a call's shares [B, h', w'] as the routers want them; views: of its rows under a positive prompt."""
        views = {row: view for row, view in views.items() if self._holds(view, like)}
        if not shares or not views:
            return
        size = like.shape[2:]
        self._sizes.setdefault(size, set()).update(tuple(share.shape[1:]) for share in shares.values())
        maps = mean_share(shares, tuple(size), self.blocks)
        for row, view in views.items():
            self.steps.add(view.within(self.size), maps[row])

    def goes_on_from(self, others: Sequence[tuple[FinishedSteps, int]], cut_from: float) -> None:
        """Begin each picture with what another run has seen of it, given with its number there.

        cut_from: the noise level at which their opening was over.
        """
        for picture, (steps, theirs) in enumerate(others):
            self.steps.goes_on(picture, steps, theirs)
        self.cut_from = cut_from
        self._find()

    def _find(self) -> None:
        shares, seen = self.steps.mean, self.steps.seen
        self._area = np.stack([_area(*picture) for picture in zip(shares, seen, strict=True)])
        self._rows.clear()

    def _holds(self, view: View, like: Tensor) -> bool:
        return view.picture < self.pictures and view.fits(self.size, like)


def _area(shares: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """bool [h, w]: where the subjects are, and what no positive prompt has shown yet."""
    cut = between_classes(shares[seen]) if seen.any() else None
    return np.ones_like(seen) if cut is None else (shares >= cut) | ~seen
