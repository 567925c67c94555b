"""The trace: the routers' choices, recorded while a picture is sampled."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .address import Address

TIMESTEPS = 1000
BINS = 10
"""Timesteps are gathered in this many bins, so that a trace does not grow with the number of steps."""


def routed_blocks(addresses: list[Address]) -> list[Address]:
    """The blocks whose routers are taught where the subjects are (eq. 9).

    The paper leaves out the first two and the last three of SD 1.5's sixteen; of another U-Net, the same shares.
    """
    count = len(addresses)
    return addresses[round(count * 2 / 16) : count - round(count * 3 / 16)]


def layer_size(latent_shape: tuple[int, int], pixels: int) -> tuple[int, int]:
    """The (h, w) of a layer with that many pixels: the latents', halved (rounded up) until it fits."""
    height, width = latent_shape
    while height * width > pixels:
        height, width = -(-height // 2), -(-width // 2)
    return height, width


class Trace:
    """Expert shares of one sampling run: per picture, layer and bin of timesteps, the mean over its steps."""

    def __init__(self, latent_shape: tuple[int, int]):
        self.latent_shape = latent_shape
        """(h, w) of the sampled latents."""
        self._layers: dict[tuple[Address, str], int] = {}
        self._sums: dict[int, Tensor] = {}  # bin -> [B, pixels of all layers]
        self._counts: dict[int, int] = {}

    def add(self, timestep: float, shares: Mapping[tuple[Address, str], Tensor]) -> None:
        """Record one call: for every layer the shares [B, N] of the B pictures. Never waits for the device."""
        self._layers = self._layers or {layer: share.shape[1] for layer, share in shares.items()}
        record = torch.cat(list(shares.values()), dim=1).float()
        bin = min(int(timestep * BINS / TIMESTEPS), BINS - 1)
        if bin in self._sums and self._sums[bin].shape == record.shape:
            self._sums[bin] += record
            self._counts[bin] += 1
        else:
            self._sums[bin], self._counts[bin] = record, 1

    def __bool__(self) -> bool:
        return bool(self._sums)

    @property
    def layers(self) -> list[tuple[Address, str]]:
        """(address, attention) of every recorded layer, in the order of the forward pass."""
        return list(self._layers)

    @property
    def timesteps(self) -> list[tuple[int, int]]:
        """The recorded bins as (from, to) in timesteps, the noisiest first."""
        width = TIMESTEPS // BINS
        return [(b * width, (b + 1) * width) for b in sorted(self._sums, reverse=True)]

    def maps(self, layer: tuple[Address, str]) -> Tensor:
        """One layer's shares over the recorded bins, [B, bins, h, w] on the CPU, at the layer's own size."""
        start = 0
        for other, pixels in self._layers.items():
            if other == layer:
                break
            start += pixels
        bins = [self._sums[b][:, start : start + pixels] / self._counts[b] for b in sorted(self._sums, reverse=True)]
        return torch.stack(bins, dim=1).cpu().unflatten(-1, layer_size(self.latent_shape, pixels))

    def subject_area(self) -> Tensor:
        """Mean share over the routed blocks and all timesteps, [B, h, w] at latent size on the CPU."""
        routed = routed_blocks(list(dict.fromkeys(address for address, _ in self._layers)))
        layers = [self.maps(layer).mean(dim=1, keepdim=True) for layer in self._layers if layer[0] in routed]
        sized = [F.interpolate(m, self.latent_shape, mode="bilinear", align_corners=False) for m in layers]
        return torch.cat(sized, dim=1).mean(dim=1)

    def to_cpu(self) -> None:
        """Free the device of a finished trace."""
        self._sums = {bin: total.cpu() for bin, total in self._sums.items()}
