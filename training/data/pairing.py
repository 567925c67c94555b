"""Which of these belongs to which of those."""

from __future__ import annotations

import torch
from torch import Tensor


def pair_up(scores: Tensor) -> list[tuple[int, int]]:
    """Greedy: scores [A, B] -> (a, b), the surest first, each at most once."""
    pairs, left = [], scores.clone()
    for _ in range(min(scores.shape)):
        a, b = divmod(int(left.argmax()), scores.shape[1])
        pairs.append((a, b))
        left[a], left[:, b] = -torch.inf, -torch.inf
    return pairs
