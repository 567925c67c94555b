"""Bindings on their way from the conditioning to the rows of a U-Net call.

Every conditioning brings maps as large as the latents: of each pixel the number of its prompt and of its picture, and
where in the picture it is. Whatever the host or another node does to latents (split, batch, repeat, reorder, cut to an
area, to tiles or to a context window), it does to the maps as well, and by them a row says what it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import comfy.conds
import torch
from torch import Tensor

from ...moa_core.subjects.binding import BoundPrompt
from ...moa_core.subjects.rows import Row
from ...moa_core.subjects.subject import Subject
from ...moa_core.subjects.view import NOWHERE, View
from ..prompt.clip_binding import BOUND_PROMPT, Binder, NotedPrompt

MODEL_COND = "moa_rows"
"""Name of the maps [B, 4, h, w] among a conditioning's model_conds: prompt, picture, row, column."""
_numbers = itertools.count()


@dataclass(frozen=True, eq=False)
class CONDPrompt:
    """What all rows of one conditioning have in common."""

    bound: BoundPrompt | None
    """None where nothing binds."""
    tokens: int
    positive: bool
    variants: tuple[int, ...]
    """The numbers of the pictures that are sampled, in the batch that they were taken out of."""
    number: int = field(default_factory=_numbers.__next__)
    """No other conditioning has it, of whatever run."""

    def row(self, view: View) -> Row:
        bindings, own_texts = ((), ()) if self.bound is None else (self.bound.bindings, self.bound.own_texts)
        return Row(view, bindings, self.tokens, self.positive, own_texts, self)

    def maps(self, pictures: Sequence[int], size: tuple[int, int]) -> comfy.conds.CONDNoiseShape:
        """Of these pictures, latents of that size; the host cuts and repeats them as it does latents."""
        rows, columns = torch.meshgrid(*map(torch.arange, size), indexing="ij")
        maps = [torch.stack([torch.full(size, n) for n in (self.number, p)] + [rows, columns]) for p in pictures]
        return comfy.conds.CONDNoiseShape(torch.stack(maps).int())  # integers: the host casts others to its type


def rows_of(
    maps: Tensor, prompts: Mapping[int, CONDPrompt], latents: Tensor, size: tuple[int, int]
) -> tuple[Row, ...] | None:
    """The rows of a call with latents [B, C, h, w]; size: of the whole pictures' latents. Waits for the device.

    None where somebody has put rows together in a way that cannot be followed; a row whose maps were not cut as its
    latents were is NOWHERE in its picture.
    """
    first, last = torch.stack([maps[:, :, 0, 0], maps[:, :, -1, -1]]).tolist()  # each [B, 4]
    height, width = latents.shape[-2:]
    cut_alike = len(first) == len(latents) and tuple(maps.shape[-2:]) == (height, width)
    times, left_over = divmod(len(latents), len(first))
    if left_over or any(number not in prompts for number, *_ in first):
        return None
    rows = []
    for (number, picture, top, left), (*_, bottom, right) in zip(first, last, strict=True):
        box = (top, left, height, width)
        if not cut_alike or (bottom - top, right - left) != (height - 1, width - 1):
            box = NOWHERE
        prompt = prompts[number]
        rows.append(prompt.row(View(picture, None if box == (0, 0, *size) else box, prompt.variants[picture])))
    return tuple(rows) * times


def prompt_of(
    name: str,
    conditioning: dict,
    binder: Binder | None,
    subjects: Mapping[Subject, Subject],
    variants: Sequence[int],
) -> CONDPrompt:
    """What one of the guider's conditionings, of that name, binds; nothing in the negative ones.

    binder: of the CLIP that may have encoded it. subjects: each as this run is to show it.
    variants: see CONDPrompt.
    """
    positive, text = "negative" not in name, conditioning.get("cross_attn")
    bound: BoundPrompt | None = conditioning.get(BOUND_PROMPT) if positive else None
    if positive and bound is None and binder is not None and text is not None:
        bound = binder.recognised(text)
    elif isinstance(bound, NotedPrompt) and text is not None:
        bound = bound.as_in(text)
    if bound is not None:
        shown = (replace(each, subject=subjects.get(each.subject, each.subject)) for each in bound.bindings)
        bound = replace(bound, bindings=tuple(shown))
    return CONDPrompt(bound, text.shape[1] if text is not None else 1, positive, tuple(variants))
