"""One U-Net call: what the MoA layers need to know besides h and the prior's output.

Both hosts have one of these made per call and send every attention layer through `mix`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..address import Address, Layer
from ..attention import Attend, attend
from ..routing.subject_area import RowsArea
from ..subjects.rows import Row
from .moa import Mixture
from .moa_layer import gathering_pays


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
    slots: Tensor | None = None
    """[K], with areas: how many of the row's tokens come before."""
    most: int = 0
    """With areas: the most tokens of any row."""

    @classmethod
    def stack(cls, tokens: Sequence[tuple[int, int, Tensor]]) -> BoundTokens | None:
        """From (row, position, feature [F]) of every token; None when there is none."""
        if not tokens:
            return None
        rows, positions, features = zip(*tokens, strict=True)
        return cls(torch.tensor(rows), torch.tensor(positions), torch.stack(features))

    @classmethod
    def of(cls, rows: Sequence[Row], context: Tensor, latents: Tensor, size: tuple[int, int]) -> BoundTokens | None:
        """Where context [B, T, D] carries which features; latents: what the rows show of size (h, w)."""
        placed = [
            (number, position, subject)
            for number, row in enumerate(rows)
            for position, subject in row.places(context.shape[1])
            if subject.adapter is None
        ]
        tokens = cls.stack([(n, position, s.feature(rows[n].view.variant)) for n, position, s in placed])
        if tokens is not None:
            if any(subject.weight != 1.0 for _, _, subject in placed):
                tokens.weights = torch.tensor([subject.weight for _, _, subject in placed])
            if any(subject.area is not None for _, _, subject in placed):
                views = [rows[n].view for n, *_ in placed]
                shown = [v.cut(s.area_in(v.variant, size), latents) for v, (*_, s) in zip(views, placed, strict=True)]
                tokens.areas = torch.stack(shown)
                tokens.slots = (tokens.rows[:, None] == tokens.rows[None]).tril(-1).sum(dim=1)
                tokens.most = int(tokens.slots.max()) + 1
            tokens = tokens.to(context)
        return tokens

    def to(self, like: Tensor) -> BoundTokens:
        """On the device of `like`, features of its type."""
        moved = {name: own.to(like.device) for name, own in vars(self).items() if isinstance(own, Tensor)}
        typed = {name: own.to(like.dtype) for name, own in moved.items() if own.is_floating_point()}
        return replace(self, **moved | typed)


class UNetCall:
    """context [B, T, D] and timestep [B] are the U-Net's own inputs of this call.

    strength multiplies the expert's share. area: where its rows may ask the expert (sparse routing); None is
    everywhere. attend: the host's attention.
    """

    in_attention = False
    """Nothing of it is within the prior's attention; see Call."""

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
        self.shares: dict[Layer, Tensor] = {}
        """The expert's share [B, h, w] of every layer met so far."""
        self.wanted: dict[Layer, Tensor] = {}
        """The share that the routers wanted: not 0 outside the area."""
        self.pixels, self.asked = 0, 0
        """Pixels of all layers met so far, and those of them that went through the expert."""
        self.taken: Callable[[tuple[int, int]], Tensor] | None = None
        """How much of each pixel of a layer of (h, w) others have, [B, h, w]."""
        self.bound = None
        """The bound tokens, on the context's device."""
        self._replaced: dict[Address, Tensor] = {}
        self._prompts: dict[Address, Tensor] = {}
        if bound is not None:
            self.bound = bound = bound.to(context)
            rows, positions = bound.rows, bound.positions
            text = context[rows, positions]  # [K, D]
            steps = timestep.to(context.device)[rows]
            replaced = mixture.subject_prompt(self.bound.features, text, steps)  # [L, K, D]
            if bound.weights is not None:
                replaced = torch.lerp(text, replaced, bound.weights[:, None])
            layers = torch.arange(len(replaced), device=context.device)[:, None]  # [L, 1]
            prompts = context.expand(len(replaced), -1, -1, -1).index_put((layers, rows, positions), replaced)
            self._replaced = dict(zip(mixture.config.prompted, replaced, strict=True))
            self._prompts = dict(zip(mixture.config.prompted, prompts, strict=True))

    def subject_prompt(self, address: Address) -> Tensor:
        """The context of one block's cross-attention [B, T, D], bound tokens replaced."""
        return self._prompts.get(address, self.context)

    def mix(self, address: Address, attention: str, h: Tensor, prior: Tensor, size: tuple[int, int]) -> Tensor:
        """h: what entered the attention; prior: what the host made of it; both [B, N, C]. Returns the mixture.

        size: the layer's (height, width). A layer without an expert is the prior's.
        """
        layer, attend_here = self.mixture.layer(address, attention), self.attend
        if layer is None:
            return prior
        context = self.subject_prompt(address) if attention == "attn2" else None
        pixels = self.area and self.area.pixels(size)
        if context is not None and self.bound is not None and self.bound.areas is not None:
            context, seen = self._placed(address, size)
            if pixels is not None and gathering_pays(h):
                seen = seen.gather(1, pixels.index[..., None].expand(-1, -1, seen.shape[-1]))
            attend_here = partial(attend, mask=seen[:, None])
        left = None if self.taken is None else 1.0 - self.taken(size).flatten(1)  # [B, N]
        mixed = layer(h, prior, context, pixels, self.strength, attend_here, left)
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
        subjects = self.context.new_zeros(batch, self.bound.most, width)
        subjects = subjects.index_put((rows, self.bound.slots), self._replaced[address])
        areas = self.bound.areas.float()
        inside = F.interpolate(areas[:, None], size, mode="area").flatten(1) > 0.5  # [K, N]
        seen = torch.zeros(batch, length + subjects.shape[1], inside.shape[1], dtype=torch.bool, device=areas.device)
        seen[:, :length] = True
        seen[rows, positions], seen[rows, length + self.bound.slots] = ~inside, inside
        return torch.cat([self.context, subjects], dim=1), seen.transpose(1, 2)
