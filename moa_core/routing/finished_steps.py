"""Maps gathered while a picture is sampled: the mean over its finished steps."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Place = tuple[int, slice, slice]
"""Which plane a map belongs to, and where in it."""


class FinishedSteps:
    """The mean over the finished steps of every plane's maps.

    A step's maps count once the noise level changes. So all calls of one level see the same, however many a sampler
    makes and however the host splits their rows. Steps are gathered on the CPU, in numpy: its calls cost least there.
    """

    def __init__(self, planes: int, size: tuple[int, int]):
        self._level: float | None = None
        self._sums: Tensor | None = None  # [planes, h, w] on the device: of this level's calls
        self._calls = np.zeros((planes, *size), np.float32)  # how many of them showed the pixel
        self._means = np.zeros_like(self._calls)  # summed over the finished levels
        self._levels = np.zeros_like(self._calls)

    @property
    def level(self) -> float | None:
        """Of the calls under way; None between steps."""
        return self._level

    @property
    def planes(self) -> int:
        return len(self._means)

    @property
    def nbytes(self) -> int:
        return self._means.nbytes + self._calls.nbytes + self._levels.nbytes

    def begin(self, level: float) -> bool:
        """Note the level of the calls to come; whether that finished another one, so that the mean has changed.

        Waits for the device when the level is a new one, and never afterwards.
        """
        if level == self._level:
            return False
        finished, self._level = self.finish(), level
        return finished

    def add(self, place: Place, shown: Tensor) -> None:
        """Note what one call shows there, [h, w]."""
        if self._sums is None:
            self._sums = torch.zeros(self._calls.shape, device=shown.device)
        self._sums[place] += shown
        self._calls[place] += 1

    def finish(self) -> bool:
        """Add what the calls of the last level showed; whether there were any."""
        self._level = None
        if self._sums is None:
            return False
        self._means += self._sums.cpu().numpy() / np.maximum(self._calls, 1)
        self._levels += self._calls > 0
        self._sums, self._calls = None, np.zeros_like(self._calls)
        return True

    def goes_on(self, plane: int, other: FinishedSteps, theirs: int) -> None:
        """Begin a plane with what another run's has seen, scaled to this one's size."""
        means, levels, size = other._means[theirs], other._levels[theirs], self._means.shape[1:]
        if means.shape != size:
            levels = _scaled(levels, size, "nearest")
            means = levels * _scaled(other.mean[theirs], size, "bilinear")
        self._means[plane], self._levels[plane] = means, levels

    @property
    def mean(self) -> np.ndarray:
        """[planes, h, w]; 0 where nothing was seen."""
        return self._means / np.maximum(self._levels, 1)

    @property
    def seen(self) -> np.ndarray:
        """bool [planes, h, w]: what any finished step has shown."""
        return self._levels > 0


def _scaled(plane: np.ndarray, size: tuple[int, int], mode: str) -> np.ndarray:
    return F.interpolate(torch.from_numpy(plane)[None, None], size, mode=mode)[0, 0].numpy()
