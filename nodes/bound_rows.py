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

MODEL_COND = "moa_rows"


@dataclass(frozen=True)
class Rows:
    """All rows of a U-Net call, in order."""

    rows: tuple[Row, ...]


class CONDBindings(comfy.conds.CONDRegular):
    """What one conditioning brings; `cond` [B, 1, 1, 1] holds the pictures' indices.

    A tensor as long as the batch is cut by the host as it cuts the latents: in a context window, picture 4
    stays picture 4.
    """

    def __init__(self, cond: Tensor, prompt: BoundPrompt | None, tokens: int, positive: bool):
        super().__init__(cond)
        self.prompt, self.tokens, self.positive = prompt, tokens, positive

    @classmethod
    def of_batch(cls, pictures: int, prompt: BoundPrompt | None, tokens: int, positive: bool) -> CONDBindings:
        return cls(torch.arange(pictures).view(-1, 1, 1, 1), prompt, tokens, positive)

    def _copy_with(self, cond: Tensor) -> CONDBindings:
        return CONDBindings(cond, self.prompt, self.tokens, self.positive)

    def process_cond(self, batch_size: int, area: list[int] | None = None, **kwargs) -> CONDRows:
        pictures = comfy.utils.repeat_to_batch_size(self.cond, batch_size).flatten().tolist()
        box = None if area is None else (*area[2:], *area[:2])  # the host's is (height, width, top, left)
        bindings = () if self.prompt is None else self.prompt.bindings
        return CONDRows(Rows(tuple(Row(View(n, box), bindings, self.tokens, self.positive) for n in pictures)))


class CONDRows(comfy.conds.CONDRegular):
    """The rows of one conditioning in a U-Net call, which the host joins with those of others."""

    def can_concat(self, other: CONDRows) -> bool:
        return True

    def concat(self, others: list[CONDRows]) -> Rows:
        return Rows(sum((other.cond.rows for other in others), self.cond.rows))

    def size(self) -> list[int]:
        return [1]
