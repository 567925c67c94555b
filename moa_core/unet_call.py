"""One U-Net call: what the MoA layers need to know besides h and the prior's output.

Both hosts have one of these made per call and send every attention layer through `mix`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .address import Address, BlockShape
from .expert import Attend, attend
from .image_expert import Prior
from .moa import Mixture
from .rows import Row
from .subject import Subject
from .subject_area import RowsArea, SubjectArea
from .word_router import WordReader, WordRouter, read_blocks


@dataclass
class BoundTokens:
    """The K bound tokens of a call: features [K, F] at context[rows, positions], rows and positions [K]."""

    rows: Tensor
    positions: Tensor
    features: Tensor
    weights: Tensor | None = None
    """[K]: how much of each subject comes through; None is all of it."""
    areas: Tensor | None = None
    """[K, h, w] in 0..1 at the latents' size: where each token is the subject's; None is everywhere."""

    @classmethod
    def stack(cls, tokens: Sequence[tuple[int, int, Tensor]]) -> BoundTokens | None:
        """From (row, position, feature [F]) of every token; None when there is none."""
        if not tokens:
            return None
        rows, positions, features = zip(*tokens, strict=True)
        return cls(torch.tensor(rows), torch.tensor(positions), torch.stack(features))

    @classmethod
    def of(cls, rows: Sequence[Row], context: Tensor, size: tuple[int, int]) -> BoundTokens | None:
        """Where context [B, T, D] carries which features; size: (h, w) of the whole latents."""
        placed = [
            (number, position, subject)
            for number, row in enumerate(rows)
            for position, subject in row.places(context.shape[1])
        ]
        tokens = cls.stack([(n, position, s.feature(rows[n].view.picture)) for n, position, s in placed])
        if tokens is not None:
            tokens.weights = torch.tensor([subject.weight for _, _, subject in placed])
            if any(subject.area is not None for _, _, subject in placed):
                shown = [rows[n].view.cut(subject.area_in(rows[n].view.picture, size)) for n, _, subject in placed]
                tokens.areas = torch.stack(shown)
        return tokens


class UNetCall:
    """context [B, T, D] and timestep [B] are the U-Net's own inputs of this call.

    strength multiplies the expert's share. area: where its rows may ask the expert (sparse routing); None is
    everywhere. attend: the host's attention.
    """

    def __init__(
        self,
        mixture: Mixture,
        context: Tensor,
        timestep: Tensor,
        bound: BoundTokens | None = None,
        strength: float = 1.0,
        area: RowsArea | None = None,
        attend: Attend = attend,
    ):
        self.mixture, self.context, self.strength, self.area, self.attend = mixture, context, strength, area, attend
        self.shares: dict[tuple[Address, str], Tensor] = {}
        """The expert's share [B, h, w] of every layer met so far."""
        self.wanted: dict[tuple[Address, str], Tensor] = {}
        """The share that the routers wanted: not 0 outside the area."""
        self.pixels, self.asked = 0, 0
        """Pixels of all layers met so far, and those of them that went through the expert."""
        self.words: WordReader | None = None
        """What reads the prior's words along the way."""
        self.bound = None
        """The bound tokens, on the context's device."""
        self._prompts: dict[Address, Tensor] = {}
        if bound is not None:
            rows, positions = bound.rows.to(context.device), bound.positions.to(context.device)
            self.bound = replace(bound, rows=rows, positions=positions, features=bound.features.to(context))
            text = context[rows, positions]  # [K, D]
            steps = timestep.to(context.device)[rows]
            replaced = mixture.subject_prompt(self.bound.features, text, steps)  # [L, K, D]
            if bound.weights is not None:
                replaced = torch.lerp(text, replaced, bound.weights.to(context)[:, None])
            self._prompts = dict(zip(mixture.config.blocks, replaced, strict=True))
            if bound.areas is not None:
                slots = (bound.rows[:, None] == bound.rows[None]).tril(-1).sum(dim=1)  # how many of the row came before
                self._slots, self._most = slots.to(context.device), int(slots.max()) + 1

    def subject_prompt(self, address: Address) -> Tensor:
        """The context of one block's cross-attention [B, T, D], bound tokens replaced."""
        if self.bound is None:
            return self.context
        return self.context.index_put((self.bound.rows, self.bound.positions), self._prompts[address])

    def mix(self, address: Address, attention: str, h: Tensor, prior: Tensor, size: tuple[int, int]) -> Tensor:
        """h: what entered the attention; prior: what the host made of it; both [B, N, C]. Returns the mixture.

        size: the layer's (height, width).
        """
        if self.words is not None and attention == "attn2":
            self.words.read(address, h, size)
        layer, attend_here = self.mixture.layer(address, attention), self.attend
        context = self.subject_prompt(address) if attention == "attn2" else None
        pixels = self.area and self.area.pixels(size)
        if context is not None and self.bound is not None and self.bound.areas is not None:
            context, seen = self._placed(address, size)
            if pixels is not None:
                seen = seen.gather(1, pixels.index[..., None].expand(-1, -1, seen.shape[-1]))
            attend_here = partial(attend, mask=seen[:, None])
        if pixels is None:
            mixed = layer.dense(h, prior, context, self.strength, attend_here)
        else:
            mixed = layer.sparse(h, prior, pixels, context, self.strength, attend_here)
        self.pixels += prior.shape[0] * prior.shape[1]
        self.asked += prior.shape[0] * (prior.shape[1] if pixels is None else pixels.index.shape[1])
        self.shares[address, attention] = mixed.share.unflatten(1, size)
        self.wanted[address, attention] = mixed.wanted.unflatten(1, size)
        return mixed.out

    def _placed(self, address: Address, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The context of subjects with areas [B, T + M, D], and bool [B, N, T + M]: what each pixel sees of it.

        Every bound token is there twice: as plain text, and after the text as its subject; a pixel sees one of them.
        """
        rows, positions = self.bound.rows, self.bound.positions
        batch, length, width = self.context.shape
        subjects = self.context.new_zeros(batch, self._most, width)
        subjects = subjects.index_put((rows, self._slots), self._prompts[address])
        areas = self.bound.areas.to(self.context.device)
        inside = F.interpolate(areas[:, None], size, mode="area").flatten(1) > 0.5  # [K, N]
        seen = torch.zeros(batch, length + subjects.shape[1], inside.shape[1], dtype=torch.bool, device=areas.device)
        seen[:, :length] = True
        seen[rows, positions], seen[rows, length + self._slots] = ~inside, inside
        return torch.cat([self.context, subjects], dim=1), seen.transpose(1, 2)


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
