"""The trace: the routers' choices, recorded while a picture is sampled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..address import Address
from .subject_area import mean_share

TIMESTEPS = 1000
BINS = 10
"""Timesteps are gathered in this many bins, so that a trace does not grow with the number of steps."""


def layer_size(latent_shape: tuple[int, int], pixels: int) -> tuple[int, int]:
    """The (h, w) of a layer with that many pixels: the latents', halved (rounded up) until it fits.

    True of an SD U-Net as it is; a host that lets others change sizes on the way must ask for the layer's own.
    """
    height, width = latent_shape
    while height * width > pixels:
        height, width = -(-height // 2), -(-width // 2)
    return height, width


Layout = tuple[tuple[tuple[Address, str], tuple[int, int]], ...]
"""The layers of a call and their sizes (h, w), in order."""


Recorded = tuple[int, Layout, tuple[int, ...]]
"""What calls whose shares are summed have in common: bin, layout and pictures."""


@dataclass
class CallSums:
    """Calls of one bin, layout and set of pictures: summed shares [B, pixels of all layers], and how many calls."""

    total: Tensor
    calls: int = 1


class Trace:
    """Expert shares of one sampling run: per picture, layer and bin of timesteps, the mean over its steps."""

    def __init__(self, latent_shape: tuple[int, int], blocks: Iterable[Address]):
        """blocks: the U-Net's, in order."""
        self.latent_shape = latent_shape
        """(h, w) of the sampled latents."""
        self._blocks = list(blocks)
        self._records: dict[Recorded, CallSums] = {}
        self._before: list[tuple[Recorded, CallSums]] = []  # of the runs that this one goes on from

    def add(
        self, timestep: float, shares: Mapping[tuple[Address, str], Tensor], pictures: Sequence[int] | None = None
    ) -> None:
        """Record one call: for every layer the shares [B, h, w] of B pictures. Never waits for the device.

        pictures: their indices in the whole batch, where a call does not hold all of it. A layer may be of
        another size in another call, or missing; a call that met no layer at all leaves nothing.
        """
        if not shares:
            return
        layout = tuple((layer, tuple(share.shape[1:])) for layer, share in shares.items())
        values = torch.cat([share.flatten(1) for share in shares.values()], dim=1).float()
        bin = min(int(timestep * BINS / TIMESTEPS), BINS - 1)
        key = (bin, layout, tuple(range(len(values)) if pictures is None else pictures))
        if key in self._records:
            self._records[key].total += values
            self._records[key].calls += 1
        else:
            self._records[key] = CallSums(values)

    def goes_on_from(self, others: Sequence[tuple[Trace, int]]) -> None:
        """Begin each picture with what another trace, of latents of the same size, has of it, and its number there."""
        for picture, (trace, theirs) in enumerate(others):
            for (bin, layout, pictures), record in trace._all():
                rows = [row for row, number in enumerate(pictures) if number == theirs]
                if rows:
                    own = CallSums(record.total[rows].sum(dim=0, keepdim=True), record.calls * len(rows))
                    self._before.append(((bin, layout, (picture,)), own))

    def __bool__(self) -> bool:
        return bool(self._all())

    @property
    def nbytes(self) -> int:
        return sum(record.total.nbytes for _, record in self._all())

    @property
    def layers(self) -> list[tuple[Address, str]]:
        """(address, attention) of every recorded layer, in the order of the forward pass."""
        met = {layer for (_, layout, _), _ in self._all() for layer, _ in layout}
        return sorted(met, key=lambda layer: (layer[0].order, layer[1]))

    @property
    def timesteps(self) -> list[tuple[int, int]]:
        """The recorded bins as (from, to) in timesteps, the noisiest first."""
        width = TIMESTEPS // BINS
        return [(b * width, (b + 1) * width) for b in self._bins()]

    def maps(self, layer: tuple[Address, str]) -> Tensor:
        """One layer's shares over the recorded bins, [B, bins, h, w] on the CPU, at the layer's largest size.

        0 where the layer did not run.
        """
        total, calls = self._gather(layer)
        return total / calls.clamp(min=1)

    def subject_area(self) -> Tensor:
        """Mean share over the routed blocks and all timesteps, [B, h, w] at latent size on the CPU."""
        means = {}
        for layer in self.layers:
            total, calls = self._gather(layer)
            bins = (calls > 0).sum(dim=1).clamp(min=1)  # those in which the layer ran
            means[layer] = (total / calls.clamp(min=1)).sum(dim=1) / bins  # [B, h, w]
        return mean_share(means, self.latent_shape, self._blocks)

    def to_cpu(self) -> None:
        """Free the device of a finished trace."""
        for record in self._records.values():
            record.total = record.total.cpu()

    def _all(self) -> list[tuple[Recorded, CallSums]]:
        return [*self._before, *self._records.items()]

    def _bins(self) -> list[int]:
        return sorted({bin for (bin, _, _), _ in self._all()}, reverse=True)

    def _gather(self, layer: tuple[Address, str]) -> tuple[Tensor, Tensor]:
        """One layer's summed shares [B, bins, h, w] at its largest size, and of how many calls [B, bins, 1, 1]."""
        bins = self._bins()
        batch = 1 + max(picture for (_, _, pictures), _ in self._all() for picture in pictures)
        sizes = {size for (_, layout, _), _ in self._all() for other, size in layout if other == layer}
        largest = max(sizes, key=lambda size: size[0] * size[1])
        total, calls = torch.zeros(batch, len(bins), *largest), torch.zeros(batch, len(bins), 1, 1)
        for (bin, layout, pictures), record in self._all():
            start = 0
            for other, (height, width) in layout:
                if other == layer:
                    share = record.total[:, start : start + height * width].cpu().unflatten(1, (1, height, width))
                    column = bins.index(bin)
                    total[list(pictures), column] += _resized(share, largest)[:, 0]
                    calls[list(pictures), column] += record.calls
                start += height * width
        return total, calls


def _resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, K, h, w] -> [B, K, *size]."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)
