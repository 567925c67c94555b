"""Maps gathered while a picture is sampled: the mean over its finished steps."""

from __future__ import annotations

import torch
from torch import Tensor

Place = tuple[int, slice, slice]
"""Which plane a map belongs to, and where in it."""


class FinishedSteps:
    """The mean over the finished steps of every plane's maps.

    A step's maps count once the noise level changes. So all calls of one level see the same, however many a sampler
    makes and however the host splits their rows.
    """

    def __init__(self, planes: int, size: tuple[int, int]):
        self._level: float | None = None
        self._sums: Tensor | None = None  # [planes, h, w] on the device: of this level's calls
        self._calls = torch.zeros(planes, *size)  # how many of them showed the pixel
        self._means = torch.zeros(planes, *size)  # summed over the finished levels
        self._levels = torch.zeros(planes, *size)

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
            self._sums = torch.zeros_like(self._calls, device=shown.device)
        self._sums[place] += shown
        self._calls[place] += 1

    def finish(self) -> bool:
        """Add what the calls of the last level showed; whether there were any."""
        self._level = None
        if self._sums is None:
            return False
        self._means += self._sums.cpu() / self._calls.clamp(min=1)
        self._levels += self._calls > 0
        self._sums, self._calls = None, torch.zeros_like(self._calls)
        return True

    @property
    def mean(self) -> Tensor:
        """[planes, h, w] on the CPU; 0 where nothing was seen."""
        return self._means / self._levels.clamp(min=1)

    @property
    def seen(self) -> Tensor:
        """bool [planes, h, w]: what any finished step has shown."""
        return self._levels > 0
