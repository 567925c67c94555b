"""One sampling run with a learned MoA."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from ..address import Address, BlockShape
from ..attention import Attend, Prior, attend
from ..routing.subject_area import SubjectArea
from ..routing.word_router import WordReader, WordRouter, read_blocks
from ..subjects.rows import Row
from ..subjects.subject import Subject
from .moa import Mixture
from .unet_call import BoundTokens, UNetCall


class LearnedRun:
    """One sampling run with a learned MoA.

    A host treats both kinds alike: a run (ImageRun is the other kind's) for every sampling run, `run.call(...)` for
    every U-Net call in it, `call.mix(...)` for every attention layer, `run.finish(...)` when the call is over.
    """

    def __init__(
        self,
        mixture: Mixture,
        subjects: Sequence[Subject],
        pictures: int,
        size: tuple[int, int],
        levels: Sequence[float],
        strength: float,
        blocks: Mapping[Address, BlockShape],
        sparse: bool,
        call_type: type[UNetCall] = UNetCall,
    ):
        """Of `pictures` latents (h, w); levels: the noise level of every step with MoA at work.

        subjects: those that any positive prompt carries. What they say and the U-Net's blocks change no picture with
        this kind; who is who in `subject_shares` is read off the prior's words. call_type: a baseline's.
        """
        self.words = WordRouter(subjects, pictures, size, levels)
        self.read = frozenset(read_blocks(blocks)) if len(subjects) > 1 else frozenset()
        self.mixture, self.strength, self.size, self.call_type = mixture, strength, size, call_type
        self.area = SubjectArea(pictures, size, levels) if sparse else None

    def call(
        self,
        rows: Sequence[Row],
        level: float,
        latents: Tensor,
        context: Tensor,
        timestep: Tensor,
        prior: Prior | None = None,
        attend: Attend = attend,
        present: Collection[Subject] | None = None,
    ) -> UNetCall:
        """A U-Net call with latents [B, C, h, w], context [B, T, D] and timestep [B] at this noise level.

        present: subjects of the prompts that are at work at this level, None is all; no difference to this kind.
        prior is asked for its words alone: the experts have projections of their own.
        """
        where = self.area and self.area.at(level, [row.view for row in rows], latents)
        bound = BoundTokens.of(rows, context, self.size)
        call = self.call_type(self.mixture, context, timestep, bound, self.strength, where, attend)
        if prior is not None and self.read:
            self.words.begin(level)
            call.words = WordReader(self.words, self.read, rows, context, prior)
        return call

    def finish(self, call: UNetCall, rows: Sequence[Row], latents: Tensor) -> None:
        """Note where the call's routers wanted their experts."""
        if self.area:
            views = {number: row.view for number, row in enumerate(rows) if row.positive}
            self.area.add(call.wanted, views, latents)
        if call.words is not None:
            call.words.note(latents)

    def subject_shares(self) -> Tensor:
        """Whose each pixel is, as all steps of the run, now over, show it: [S, P, h, w]. All is a single subject's."""
        self.words.finish()
        shares = self.words.last()
        return torch.ones_like(shares) if len(shares) == 1 else shares
