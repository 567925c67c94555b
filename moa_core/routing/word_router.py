"""The word router: where each subject's word is in the picture, read off the prior's own attention, without training.

The prior attends to the bound word wherever it is about to draw what the word names (as DAAM and Conceptrol use it).
Adapters have no router of their own and are routed by this.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..address import Address, BlockShape
from ..attention import attention_map
from ..subjects.rows import Row
from ..subjects.subject import Subject
from ..subjects.view import View
from .finished_steps import FinishedSteps

BLUR = 1 / 8
"""Standard deviation of the blur before people are told apart, as a part of the picture's shorter side. In the toy
world's pairs the right person had 0.80 of the pixels without it, 0.89 with half of it, 0.95 with this."""
CUT = 0.3
"""Where the words' maps together have risen to this part of their own mean, somebody is. Chosen with GROWTH on pairs
of the toy world, each person from a LoRA of their own."""
GROWTH = 1 / 12
"""How far people reach beyond that, as a part of the picture's shorter side: hair and outline lie outside what the
prior's own person covers."""
SCOUTED = 2
"""Steps of the scouting: the prior alone, before the sampling proper, to see where the words will be."""
SCOUTED_SPAN = 1 / 12
"""How far each of them goes, as a part of all timesteps that are left; finer sampling has no finer scouting."""


def scouting_timesteps(first: float) -> list[int]:
    """Where the scouting of a sampling from timestep `first` on goes; however early that sampling is cut off."""
    return [round(first - first * SCOUTED_SPAN * step) for step in range(SCOUTED + 1)]


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

    Somebody is where the words' maps together exceed CUT, having risen from 0 where they are least to 1 at their mean
    over the pixels, each weighted by its own value; such a pixel is the subject's whose blurred map is the greatest
    there. Each then grows by GROWTH over what is nobody's. A subject with an `area` of its own has it from the first
    step on, the others have the rest; where such areas overlap, the strongest wins, then the first.

    Before the first step is finished, shares are those of the scouting, or of the run that this one goes on from.
    """

    def __init__(
        self,
        subjects: Sequence[Subject],
        pictures: int,
        size: tuple[int, int],
        numbers: Sequence[int] | None = None,
    ):
        """size: (h, w) of the latents. numbers: of the pictures, where they were taken out of a larger batch."""
        self.subjects, self.pictures, self.size = list(subjects), pictures, size
        self._number = {subject: number for number, subject in enumerate(subjects)}
        self.steps = FinishedSteps(len(self.subjects) * pictures, size)
        self._areas = [
            None if s.area is None else torch.stack([s.area_in(number, size) for number in numbers or range(pictures)])
            for s in subjects
        ]
        self._shares: Tensor | None = None
        self._parts: dict[tuple[int, int, int], list[tuple[slice, slice, Tensor]]] = {}
        """Of this level's calls that showed parts of pictures, by subject, picture and number of layers."""

    def begin(self, level: float) -> None:
        """Note the level of the calls to come. Waits for the device when it is a new one, and never afterwards."""
        if level != self.steps.level:
            self._join_parts()
        if self.steps.begin(level):
            self._shares = None

    def at(self, level: float) -> Tensor:
        """The shares [S, P, h, w] at this noise level, on the CPU."""
        self.begin(level)
        return self.last()

    def last(self) -> Tensor:
        """The shares [S, P, h, w] as all finished steps show them, on the CPU."""
        if self._shares is None:
            self._shares = self._shares_of(self.steps)
        return self._shares

    def finish(self) -> None:
        """Note that the run is over: its last step counts as well."""
        self._join_parts()
        if self.steps.finish():
            self._shares = None

    @property
    def is_blind(self) -> bool:
        """Whether anybody's place has to be found and nothing is known of it yet."""
        return any(map(self.reads, self.subjects)) and not self.steps.seen.any()

    def goes_on_from(self, others: Sequence[tuple[FinishedSteps, int]]) -> None:
        """Begin each picture with what another router of the same subjects has seen of it, and its number there."""
        for picture, (steps, theirs) in enumerate(others):
            pictures = steps.planes // max(len(self.subjects), 1)
            for number in range(len(self.subjects)):
                self.steps.goes_on(number * self.pictures + picture, steps, number * pictures + theirs)
        self._shares = None

    def reads(self, subject: Subject) -> bool:
        """Whether the subject's maps are asked for: not where its area is given."""
        return subject.area is None

    def number(self, subject: Subject) -> int | None:
        """The subject's index in the shares."""
        return self._number.get(subject)

    def add(self, subject: Subject, view: View, attention: Tensor) -> None:
        """Note the attention of L layers [L, h', w'] to the subject's word in what the view shows."""
        number = self.number(subject)
        if number is None or view.picture >= self.pictures:
            return
        _, rows, columns = view.within(self.size)
        size = len(range(*rows.indices(self.size[0]))), len(range(*columns.indices(self.size[1])))
        shown = F.interpolate(attention[None].float(), size, mode="bilinear", align_corners=False)[0]
        part = (rows, columns, shown)
        if view.box is None:
            self._add_relative(number, view.picture, [part])
        else:
            self._parts.setdefault((number, view.picture, len(shown)), []).append(part)

    def _join_parts(self) -> None:
        """Add the tiles that a finished level's calls have shown: each compared with all, since a tile without the word
        is as even as one that it fills.
        """
        for (number, picture, _), parts in self._parts.items():
            self._add_relative(number, picture, parts)
        self._parts.clear()

    def _add_relative(self, number: int, picture: int, parts: list[tuple[slice, slice, Tensor]]) -> None:
        """Attention [L, h, w] of the same layers in parts of a picture, divided by its mean over all of them."""
        means = torch.cat([shown.flatten(1) for *_, shown in parts], dim=1).mean(dim=1).clamp(min=1e-8)
        for rows, columns, shown in parts:
            relative = (shown / means[:, None, None]).mean(dim=0)
            self.steps.add((number * self.pictures + picture, rows, columns), relative)

    def _shares_of(self, steps: FinishedSteps) -> Tensor:
        shape = (len(self.subjects), self.pictures, *self.size)
        if not self.subjects:
            return torch.zeros(shape)
        maps, seen = steps.mean.reshape(shape), steps.seen.reshape(shape)
        strength = np.where(seen, _blurred(maps), -np.inf)
        people = _winners(strength, _anyone(maps.max(axis=0), seen.any(axis=0)))
        return self._with_areas(torch.from_numpy(_grown(people, strength).astype(np.float32)))

    def _with_areas(self, shares: Tensor) -> Tensor:
        """What has an area of its own is there and nowhere else; the others have what is left."""
        given = {number: area for number, area in enumerate(self._areas) if area is not None}
        if not given:
            return shares
        areas = torch.stack(list(given.values()))  # [A, P, h, w]
        own = areas * (torch.arange(len(areas)).view(-1, 1, 1, 1) == areas.argmax(dim=0))
        shares = shares * (areas.amax(dim=0) == 0)
        shares[list(given)] = own
        return shares


class WordReader:
    """Where the prior looks for the words of one U-Net call's rows."""

    def __init__(self, router: WordRouter, blocks: Collection[Address], rows: Sequence[Row], length: int):
        """blocks: those that are read; length: of the call's context."""
        self.router, self.blocks, self.rows = router, blocks, rows
        self._places = [
            [place for place in row.places(length) if row.positive and router.reads(place[1])] for row in rows
        ]
        asking = [number for number, places in enumerate(self._places) if places]
        self._asking = slice(asking[0], asking[-1] + 1) if asking else slice(0)  # most often side by side
        self._maps: list[tuple[Subject, View, Tensor]] = []

    def wants(self, address: Address) -> bool:
        """Whether that block's attention is read."""
        return address in self.blocks and self._asking.stop > 0

    def read(self, q: Tensor, k: Tensor, heads: int, size: tuple[int, int]) -> None:
        """The prior's queries [B, N, C] and keys [B, T, C] in a block that is wanted; size: its (height, width)."""
        attention = attention_map(q[self._asking], k[self._asking], heads)  # [R, N, T]
        for number, weights in enumerate(attention, start=self._asking.start):
            maps: dict[Subject, Tensor] = {}
            for position, subject in self._places[number]:
                here = weights[:, position].unflatten(0, size)
                maps[subject] = maps[subject] + here if subject in maps else here
            self._maps += [(subject, self.rows[number].view, here) for subject, here in maps.items()]

    def note(self, latents: Tensor) -> None:
        """Hand over to the router what a call with these latents [B, C, h, w] has shown."""
        shown: dict[tuple[Subject, View, torch.Size], list[Tensor]] = {}
        for subject, view, attention in self._maps:
            if view.fits(self.router.size, latents):
                shown.setdefault((subject, view, attention.shape), []).append(attention)
        for (subject, view, _), layers in shown.items():
            self.router.add(subject, view, torch.stack(layers))


def _anyone(maps: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """bool [P, h, w]: where somebody is in each picture; nowhere, where nothing was seen, or all is the same."""
    least = np.where(seen, maps, np.inf).min(axis=(1, 2), keepdims=True)
    spread = np.where(seen, maps, -np.inf).max(axis=(1, 2), keepdims=True) - least
    rising = np.where(seen & (spread > 1e-6), maps - least, 0.0)
    full = np.square(rising).sum(axis=(1, 2), keepdims=True) / rising.sum(axis=(1, 2), keepdims=True).clip(1e-12)
    return (rising > CUT * full) & (rising > 0)


def _winners(strength: np.ndarray, there: np.ndarray) -> np.ndarray:
    """bool [S, P, h, w]: of the pixels that are there, [P, h, w], each is the strongest subject's."""
    wins = np.arange(len(strength)).reshape(-1, 1, 1, 1) == strength.argmax(axis=0)
    return wins & there & np.isfinite(strength.max(axis=0))


def _grown(people: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """Everybody, bool [S, P, h, w], by GROWTH larger; what had an owner keeps it, the strongest takes the rest."""
    rows, columns = (_within(side, max(1, round(GROWTH * min(people.shape[-2:])))) for side in people.shape[-2:])
    reached = rows @ people.astype(np.float32) @ columns > 0
    return people | _winners(np.where(reached, strength, -np.inf), ~people.any(axis=0))


def _blurred(maps: np.ndarray) -> np.ndarray:
    """[S, P, h, w] with a Gaussian blur, edges repeated."""
    rows, columns = (_gaussian(side, BLUR * min(maps.shape[-2:])) for side in maps.shape[-2:])
    return rows @ maps @ columns.T


@cache
def _within(side: int, reach: int) -> np.ndarray:
    """[side, side]: 1 for pixels of a line that are no further apart."""
    return np.tri(side, k=reach, dtype=np.float32) * np.tri(side, k=reach, dtype=np.float32).T


@cache
def _gaussian(side: int, sigma: float) -> np.ndarray:
    """[side, side]: a line's blur, to two sigma; of what lies beyond an edge the edge has the weight."""
    radius = max(1, round(2 * sigma))
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    blur = np.zeros((side, side), np.float32)
    for pixel in range(side):
        np.add.at(blur[pixel], (pixel + offsets).clip(0, side - 1), kernel / kernel.sum())
    return blur
