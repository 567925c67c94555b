"""The learned MoA's part in one sampling run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..attention import Attend, attend
from ..routing.subject_area import SubjectArea
from ..subjects.rows import Row
from .moa import Mixture
from .unet_call import BoundTokens, UNetCall

ROWS_KEPT = 16
"""Kinds of calls, by what their rows carry, whose bound tokens are kept: a host that splits a batch makes several."""


class LearnedRun:
    """Experts and routers that were trained beside the prior, in a run of `pictures` latents (h, w).

    cut_from: the noise level at which sparse routing begins.
    """

    def __init__(
        self,
        mixture: Mixture,
        pictures: int,
        size: tuple[int, int],
        cut_from: float,
        strength: float,
        sparse: bool,
        call_type: type[UNetCall] = UNetCall,
    ):
        """call_type: a baseline's."""
        self.mixture, self.strength, self.size, self.call_type = mixture, strength, size, call_type
        self.area = SubjectArea(pictures, size, cut_from, mixture.config.blocks) if sparse else None
        self._bound: dict[tuple, BoundTokens | None] = {}

    def call(
        self,
        rows: Sequence[Row],
        level: float,
        latents: Tensor,
        context: Tensor,
        timestep: Tensor,
        attend: Attend = attend,
        taken: Callable[[tuple[int, int]], Tensor] | None = None,
    ) -> UNetCall:
        """A U-Net call with latents [B, C, h, w], context [B, T, D] and timestep [B] at this noise level.

        taken: how much of each pixel of a layer of (h, w) others have, [B, h, w]; None: nothing.
        """
        where = self.area and self.area.at(level, [row.view for row in rows], latents)
        key = (tuple(rows), context.shape[1], context.dtype, latents.shape[2:])
        if key not in self._bound:
            if len(self._bound) == ROWS_KEPT:
                self._bound.clear()
            self._bound[key] = BoundTokens.of(rows, context, latents, self.size)
        bound = self._bound[key]
        call = self.call_type(self.mixture, context, timestep, bound, self.strength, where, attend)
        call.taken = taken
        return call

    def finish(self, call: UNetCall, rows: Sequence[Row], latents: Tensor) -> None:
        """Note where the call's routers wanted their experts."""
        if self.area:
            views = {number: row.view for number, row in enumerate(rows) if row.positive}
            self.area.add(call.wanted, views, latents)
