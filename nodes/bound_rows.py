"""Bindings on their way from the conditioning to the rows of a U-Net call.

They travel as one more entry of the host's model_conds, so that whatever the host does to a conditioning
(split, batch, reorder, cut to an area or to a context window), it does to its bindings too.
"""

from __future__ import annotations

from dataclasses import dataclass

import comfy.conds
import comfy.utils
import torch
from torch import Tensor

from ..moa_core.subjects.binding import BoundPrompt
from ..moa_core.subjects.rows import Row
from ..moa_core.subjects.view import View
from .clip_binding import BOUND_PROMPT, NotedPrompt

MODEL_COND = "moa_rows"


@dataclass(frozen=True)
class Rows:
    """All rows of a U-Net call, in order."""

    rows: tuple[Row, ...]


@dataclass(frozen=True, eq=False)
class CONDPrompt:
    """What all rows of one conditioning have in common."""

    bound: BoundPrompt | None
    """None where nothing binds."""
    tokens: int
    positive: bool

    def row(self, view: View) -> Row:
        bindings, own_texts = ((), ()) if self.bound is None else (self.bound.bindings, self.bound.own_texts)
        return Row(view, bindings, self.tokens, self.positive, own_texts, self)


class CONDBindings(comfy.conds.CONDRegular):
    """What one conditioning brings; `cond` [B, 1, 1, 1] holds the pictures' indices.

    A tensor as long as the batch is cut by the host as it cuts the latents: in a context window, picture 4
    stays picture 4.
    """

    def __init__(self, cond: Tensor, common: CONDPrompt):
        super().__init__(cond)
        self.common = common

    @property
    def prompt(self) -> BoundPrompt | None:
        return self.common.bound

    @property
    def positive(self) -> bool:
        return self.common.positive

    def _copy_with(self, cond: Tensor) -> CONDBindings:
        return CONDBindings(cond, self.common)

    def process_cond(self, batch_size: int, area: list[int] | None = None, **kwargs) -> CONDRows:
        pictures = comfy.utils.repeat_to_batch_size(self.cond, batch_size).flatten().tolist()
        box = None if area is None else (*area[2:], *area[:2])  # the host's is (height, width, top, left)
        return CONDRows(Rows(tuple(self.common.row(View(n, box)) for n in pictures)))


class CONDRows(comfy.conds.CONDRegular):
    """The rows of one conditioning in a U-Net call, which the host joins with those of others."""

    def can_concat(self, other: CONDRows) -> bool:
        return True

    def concat(self, others: list[CONDRows]) -> Rows:
        return Rows(sum((other.cond.rows for other in others), self.cond.rows))

    def size(self) -> list[int]:
        return [1]


def bindings_of(name: str, conditioning: dict, pictures: int) -> CONDBindings:
    """What one of the guider's conditionings, of that name, binds; nothing in the negative ones."""
    positive, text = "negative" not in name, conditioning.get("cross_attn")
    prompt: BoundPrompt | None = conditioning.get(BOUND_PROMPT) if positive else None
    if isinstance(prompt, NotedPrompt) and text is not None:
        prompt = prompt.as_in(text)
    common = CONDPrompt(prompt, text.shape[1] if text is not None else 1, positive)
    return CONDBindings(torch.arange(pictures).view(-1, 1, 1, 1), common)
