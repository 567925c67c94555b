"""Where the adapters act in the rows of a U-Net call, and what they ask there; both by the subjects' numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import PriorAttention
from ..subjects.rows import Row
from ..subjects.subject import Subject
from .deltas import Amounts, Deltas
from .image_expert import ImageExpert, ImageMixture

KeysValues = tuple[Tensor, Tensor]
"""Both [B * S, T, C]."""


class RowsShares:
    """Every subject's share in the rows of one U-Net call, at the size of any layer."""

    def __init__(self, shares: Tensor, parts: Tensor, like: Tensor):
        """shares: [B, S, h, w] on the CPU; parts: [B, S, P], how much of each part a row's picture has where that
        subject's share is 1; like: of the layers' type.
        """
        self.shares, self._parts = shares, parts
        self.rows, self.anyone = len(shares), bool(shares.any())
        self._like = like.new_empty(0)
        self._sized: dict[tuple[int, int], SizedShares] = {}

    def at(self, size: tuple[int, int]) -> SizedShares:
        if size not in self._sized:
            shown = F.interpolate(self.shares, size, mode="area")  # [B, S, h, w]
            parts = torch.einsum("bshw,bsp->bphw", shown, self._parts)
            self._sized[size] = SizedShares(shown.to(self._like), Amounts(parts.to(self._like)))
        return self._sized[size]


class SizedShares:
    """The same for the layers of one size."""

    def __init__(self, shares: Tensor, amounts: Amounts):
        """shares: [B, S, h, w] on the device."""
        self.shares, self.amounts = shares, amounts
        self.all = shares.sum(dim=1).clamp(max=1.0)
        """[B, h, w]: what belongs to any of the subjects."""
        self.effect: Tensor | None = None
        """Kept here by the call: `all` after strength."""
        self._of: dict[tuple, Tensor] = {}

    def of(self, ask: Ask) -> Tensor:
        """How much of the ask's answers each pixel gets, [B, N, S] of its subjects."""
        key = id(ask)
        if key not in self._of:
            picked = self.shares[:, ask.numbers].flatten(2).mT * ask.amount.to(self.shares)[:, None]
            self._of[key] = picked.contiguous()
        return self._of[key]


class Ask:
    """What S subjects of a call's rows ask in cross-attention beside the prompt: the same in all steps."""

    instead = False
    """Whether the answer stands in the place of the prompt's, or is added to it."""

    def __init__(self, numbers: Sequence[int], amount: Tensor):
        """numbers: of the subjects; amount: [B, S], how much of the answer a row has where the share is 1."""
        self.numbers, self.amount = list(numbers), amount
        self._kept: dict[str, KeysValues] = {}

    def keys_values(self, prior: PriorAttention) -> KeysValues:
        """Row by row, and in each subject by subject."""
        if prior.name not in self._kept:
            self._kept[prior.name] = self._make(prior)
        return self._kept[prior.name]

    def _make(self, prior: PriorAttention) -> KeysValues:
        raise NotImplementedError


class ImageAsk(Ask):
    """Image tokens of an IP-Adapter's subjects; rows under a negative prompt have those of a picture of nobody."""

    def __init__(
        self,
        mixture: ImageMixture,
        layers: Mapping[str, ImageExpert],
        subjects: Mapping[int, Subject],
        rows: Sequence[Row],
        strength: float,
        like: Tensor,
    ):
        """layers: the mixture's by the prior's names of its attentions; subjects: by number."""
        weights = torch.tensor([[subject.weight * strength for subject in subjects.values()]])
        super().__init__(list(subjects), weights.expand(len(rows), -1))
        self.layers, width = layers, mixture.negative.shape[1]
        tokens = [
            subject.feature(row.view.variant).unflatten(0, (-1, width)) if row.positive else mixture.negative
            for row in rows
            for subject in subjects.values()
        ]
        length = math.lcm(*map(len, tokens))  # several photos are more tokens than one
        self.tokens = torch.stack([_repeated(each, length) for each in tokens]).to(like)  # [B * S, n, D]

    def _make(self, prior: PriorAttention) -> KeysValues:
        return self.layers[prior.name].keys_values(self.tokens)


class TextAsk(Ask):
    """The own texts of subjects with deltas, read by the prior's layers with those deltas: in the prompt's place.

    A subject without a text of its own, and rows under a negative prompt, have the row's.
    """

    instead = True

    def __init__(
        self,
        deltas: Deltas,
        subjects: Mapping[int, Subject],
        rows: Sequence[Row],
        context: Tensor,
        amounts: Tensor,
        strength: float,
    ):
        """subjects: by number; context: [B, T, D]; amounts: [B, all subjects, P] of all parts."""
        super().__init__(list(subjects), torch.full((len(rows), len(subjects)), min(1.0, strength)))
        self.deltas = deltas
        texts = [
            _own_text(row, subject, text)
            for row, text in zip(rows, context, strict=True)
            for subject in subjects.values()
        ]
        length = math.lcm(*map(len, texts))
        self.texts = torch.stack([_repeated(text, length) for text in texts])  # [B * S, L, D]
        own = amounts[:, self.numbers].flatten(0, 1)[..., None]  # [B * S, P, 1]
        self.amounts = Amounts(own.to(context))

    def _make(self, prior: PriorAttention) -> KeysValues:
        keys_values = []
        for name, projection in (("to_k", prior.to_k), ("to_v", prior.to_v)):
            out, changed = projection(self.texts), self.deltas.of(f"{prior.name}.{name}")
            keys_values.append(out if changed is None else changed(self.texts, out, self.amounts))
        return tuple(keys_values)


def _own_text(row: Row, subject: Subject, text: Tensor) -> Tensor:
    """What the subject's adapter reads in a row whose prompt is text [T, D]; of several files' the mean, weighted."""
    found = next((own for own in row.own_texts if own.subject == subject), None)
    if found is None or not row.positive or all(own is None for own in found.texts):
        return text
    known = found.texts
    if found.of_variants:
        return known[row.view.variant % len(known)][0].to(text)
    texts = [text if own is None else own[0].to(text) for own in known]
    length, amounts = math.lcm(*map(len, texts)), subject.feature(row.view.variant)
    weights = (amounts / amounts.sum().clamp(min=1e-6)).to(text)
    return sum(weight * _repeated(each, length) for weight, each in zip(weights, texts, strict=True))


def _repeated(tokens: Tensor, length: int) -> Tensor:
    """[T, D] -> [length, D], over and over: attention to it is the same."""
    return tokens.repeat(length // len(tokens), 1)
