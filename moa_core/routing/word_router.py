"""The word router: where each subject's word is in the picture, read off the prior's own attention, without training.

The prior attends to the bound word wherever it is about to draw what the word names (as DAAM and Conceptrol use it).
The image expert has no router of its own and is routed by this.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..address import Address, BlockShape
from ..attention import Prior
from ..subjects.rows import Row
from ..subjects.subject import Subject
from ..subjects.view import View
from .finished_steps import FinishedSteps
from .subject_area import level_after

BEGINNING = 0.15
"""Part of the steps, at the beginning, in which the prior draws alone: the words have not found their places yet. In
the toy world people come through better the earlier; Conceptrol, on photos, waits for a fifth."""
BLUR = 1 / 8
"""Standard deviation of the blur before people are told apart, as a part of the picture's shorter side. In the toy
world's pairs the right person had 0.80 of the pixels without it, 0.89 with half of it, 0.95 with this."""


def read_blocks(blocks: Mapping[Address, BlockShape]) -> list[Address]:
    """The blocks whose attention to words says best where they are: a quarter of the latents' size, early to answer.

    Of SD 1.5 the decoder's widest, output.3.0 to output.5.0; of SDXL, known by its stacks of transformers, all of the
    middle and of output.1.
    """
    if any(address.index > 0 for address in blocks):
        return [address for address in blocks if (address.kind, address.block) in (("middle", 0), ("output", 1))]
    decoder = [address for address in blocks if address.kind == "output"]
    widest = max((blocks[address].dim for address in decoder), default=0)
    return [address for address in decoder if blocks[address].dim == widest]


class WordRouter:
    """Every subject's share of every picture of one sampling run, as its finished steps show it.

    share_k = area where k wins: area rises with the words' maps together, from 0 where they are least to 1 at
    their mean over the pixels, each weighted by its own value; a pixel is the subject's whose blurred map is the
    greatest there. A subject with an `area` of its own has it from the first step on, the others have the rest; where
    such areas overlap, the strongest wins, then the first.
    """

    def __init__(self, subjects: Sequence[Subject], pictures: int, size: tuple[int, int], levels: Sequence[float]):
        """size: (h, w) of the latents; levels: the noise level of every step in which MoA is at work."""
        self.subjects, self.pictures, self.size = list(subjects), pictures, size
        self._number = {id(subject): number for number, subject in enumerate(subjects)}
        self._from = level_after(BEGINNING, levels)
        self._maps = FinishedSteps(len(self.subjects) * pictures, size)
        self._areas = [
            None if s.area is None else torch.stack([s.area_in(picture, size) for picture in range(pictures)])
            for s in subjects
        ]
        self._given = self._shares(None)
        self._routed: Tensor | None = self._given

    def begin(self, level: float) -> None:
        """Note the level of the calls to come. Waits for the device when it is a new one, and never afterwards."""
        if self._maps.begin(level):
            self._routed = None

    def at(self, level: float) -> Tensor:
        """The shares [S, P, h, w] at this noise level, on the CPU."""
        self.begin(level)
        return self.last() if level <= self._from else self._given

    def last(self) -> Tensor:
        """The shares [S, P, h, w] as all finished steps show them, on the CPU."""
        if self._routed is None:
            self._routed = self._shares(self._maps)
        return self._routed

    def finish(self) -> None:
        """Note that the run is over: its last step counts as well."""
        if self._maps.finish():
            self._routed = None

    def reads(self, subject: Subject) -> bool:
        """Whether the subject's maps are asked for: not where its area is given."""
        return subject.area is None

    def number(self, subject: Subject) -> int | None:
        """The subject's index in the shares."""
        return self._number.get(id(subject))

    def add(self, subject: Subject, view: View, attention: Tensor) -> None:
        """Note a layer's attention [h', w'] to the subject's word in what the view shows."""
        number = self.number(subject)
        if number is None or view.picture >= self.pictures:
            return
        _, rows, columns = view.within(self.size)
        size = len(range(*rows.indices(self.size[0]))), len(range(*columns.indices(self.size[1])))
        shown = F.interpolate(attention[None, None].float(), size, mode="bilinear", align_corners=False)[0, 0]
        self._maps.add((number * self.pictures + view.picture, rows, columns), shown / shown.mean().clamp(min=1e-8))

    def _shares(self, steps: FinishedSteps | None) -> Tensor:
        shape = (len(self.subjects), self.pictures, *self.size)
        if not self.subjects:
            return torch.zeros(shape)
        if steps is None:
            maps, seen = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
        else:
            maps, seen = (x.view(shape) for x in (steps.mean, steps.seen))
        anyone = _area(maps.amax(dim=0), seen.any(dim=0))  # [P, h, w]
        strength = _blurred(maps).where(seen, -torch.inf)
        shares = anyone.expand(shape).clone()
        for number, area in enumerate(self._areas):
            if area is not None:
                strength[number] = (FIRST + area).where(area > 0, -torch.inf)
                shares[number] = area
        best, winner = strength.max(dim=0)
        wins = torch.arange(shape[0]).view(-1, 1, 1, 1) == winner
        return shares * (wins & best.isfinite())


class WordReader:
    """Where the prior looks for the words of one U-Net call's rows."""

    def __init__(
        self, router: WordRouter, blocks: Collection[Address], rows: Sequence[Row], context: Tensor, prior: Prior
    ):
        """blocks: those that are read; context [B, T, D]."""
        self.router, self.blocks, self.rows, self.prior = router, blocks, rows, prior
        length = context.shape[1]
        self._places = [
            [place for place in row.places(length) if row.positive and router.reads(place[1])] for row in rows
        ]
        asking = [number for number, places in enumerate(self._places) if places]
        self._asking = slice(asking[0], asking[-1] + 1) if asking else slice(0)  # most often side by side
        self._text = context[self._asking]
        self._maps: list[tuple[Subject, View, Tensor]] = []

    def read(self, address: Address, h: Tensor, size: tuple[int, int]) -> None:
        """h [B, N, C]: what entered the cross-attention there; size: the layer's (height, width)."""
        if address not in self.blocks or not len(self._text):
            return
        attention = self.prior(address).attention_to(h[self._asking], self._text)  # [R, N, T]
        for number, weights in enumerate(attention, start=self._asking.start):
            maps: dict[Subject, Tensor] = {}
            for position, subject in self._places[number]:
                here = weights[:, position].unflatten(0, size)
                maps[subject] = maps[subject] + here if subject in maps else here
            self._maps += [(subject, self.rows[number].view, here) for subject, here in maps.items()]

    def note(self, latents: Tensor) -> None:
        """Hand over to the router what a call with these latents [B, C, h, w] has shown."""
        for subject, view, attention in self._maps:
            if view.fits(self.router.size, latents):
                self.router.add(subject, view, attention)


FIRST = 1e6
"""Stronger than any attention."""


def _area(maps: Tensor, seen: Tensor) -> Tensor:
    """[P, h, w] -> 0..1 in each picture; 0 where nothing was seen, or where all is the same."""
    least = maps.where(seen, torch.inf).amin(dim=(1, 2), keepdim=True)
    spread = maps.where(seen, -torch.inf).amax(dim=(1, 2), keepdim=True) - least
    rising = (maps - least).where(seen & (spread > 1e-6), 0.0)
    full = rising.square().sum(dim=(1, 2), keepdim=True) / rising.sum(dim=(1, 2), keepdim=True)
    return (rising / full).clamp(0.0, 1.0).where(rising > 0, 0.0)


def _blurred(maps: Tensor) -> Tensor:
    """[S, P, h, w] with a Gaussian blur, edges repeated."""
    sigma = BLUR * min(maps.shape[-2:])
    radius = max(1, round(2 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    flat = F.pad(maps.flatten(0, 1)[:, None], (radius,) * 4, mode="replicate")
    flat = F.conv2d(F.conv2d(flat, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
    return flat[:, 0].view(maps.shape)
