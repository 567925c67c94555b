"""Bindings on their way from the conditioning to the rows of a U-Net call.

They travel as one more entry of the host's model_conds, so that whatever the host does to a conditioning
(split, batch, reorder, cut to an area), it does to its bindings too.
"""

from __future__ import annotations

from dataclasses import dataclass

import comfy.conds
from torch import Tensor

from ..moa_core.binding import BoundPrompt
from ..moa_core.unet_call import BoundTokens

MODEL_COND = "moa_rows"


@dataclass(frozen=True)
class Row:
    """One row of a U-Net call."""

    prompt: BoundPrompt | None
    """None: nothing binds here (a negative prompt, or one that no MoA CLIP encoded)."""
    tokens: int
    """Length of the row's own text embedding; the host repeats it to match longer ones in the batch."""
    picture: int
    """Index of the picture in the latent batch."""
    traced: bool
    """Whether the row shows a whole picture under a positive prompt."""


@dataclass(frozen=True)
class Rows:
    """All rows of a U-Net call, in order."""

    rows: tuple[Row, ...]

    def bound_tokens(self, context: Tensor) -> BoundTokens | None:
        """Where context [B, T, D] carries which features."""
        return BoundTokens.stack(
            [
                (index, binding.position + start, binding.subject.feature(row.picture))
                for index, row in enumerate(self.rows)
                if row.prompt is not None
                for binding in row.prompt.bindings
                for start in range(0, context.shape[1] - row.tokens + 1, row.tokens)
            ]
        )


class CONDRows(comfy.conds.CONDRegular):
    """The host's handle on the rows of one conditioning; `cond` is (prompt, tokens, positive), then Rows."""

    def process_cond(self, batch_size: int, area=None, **kwargs) -> CONDRows:
        prompt, tokens, positive = self.cond
        return CONDRows(Rows(tuple(Row(prompt, tokens, i, positive and area is None) for i in range(batch_size))))

    def can_concat(self, other: CONDRows) -> bool:
        return True

    def concat(self, others: list[CONDRows]) -> Rows:
        return Rows(sum((other.cond.rows for other in others), self.cond.rows))

    def size(self) -> list[int]:
        return [1]
