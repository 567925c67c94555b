"""Image tokens: what an IP-Adapter (Ye et al., 2023) makes of a picture for its attention, one class a kind of file.

Names of modules are those of the published files. Each class says which output of a CLIP vision model it reads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..attention import attend

POOLED, GRID = "image_embeds", "penultimate_hidden_states"
"""Outputs of a CLIP vision model: one vector a picture [P, F], or what enters its last layer [P, patches + 1, F]."""
HEAD = 64
"""Channels of one attention head of a Resampler."""


class ImageTokens(nn.Module):
    """What is common to all kinds: output `reads`, F wide, becomes `count` tokens, each `dim` wide."""

    reads: str | None
    """None: no CLIP vision model is asked."""
    face: str | None = None
    """Which embedding of a face is read, by insightface's name for it. None: no face is looked for."""
    width: int
    count: int
    dim: int


class PooledTokens(ImageTokens):
    """The first kind (`ip-adapter_sd15`, `_light`): the pooled picture [P, F] -> 4 tokens [P, 4, D]."""

    reads, count = POOLED, 4

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.width, self.dim = width, dim
        self.proj = nn.Linear(width, self.count * dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.norm(self.proj(pooled).unflatten(-1, (self.count, self.dim)))


class GridTokens(ImageTokens):
    """`full-face`: every patch of the picture [P, 257, F] is a token of its own, [P, 257, D]."""

    reads, count = GRID, 257

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.width, self.dim = width, dim
        self.proj = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, dim), nn.LayerNorm(dim))

    def forward(self, grid: Tensor) -> Tensor:
        return self.proj(grid)


class Perceiver(nn.Module):
    """Tokens [P, n, hidden] read a picture [P, N, F] in a few layers -> [P, n, D]."""

    def __init__(self, width: int, dim: int, hidden: int, inner: int, feed_forward: int, depth: int):
        """inner: channels of all attention heads together."""
        super().__init__()
        self.width, self.dim = width, dim
        self.proj_in = nn.Linear(width, hidden)
        self.layers = nn.ModuleList(
            nn.ModuleList([ResamplerAttention(hidden, inner), _feed_forward(hidden, feed_forward)])
            for _ in range(depth)
        )
        self.proj_out = nn.Linear(hidden, dim)
        self.norm_out = nn.LayerNorm(dim)

    def read(self, tokens: Tensor, grid: Tensor) -> Tensor:
        grid = self.proj_in(grid)  # [P, N, hidden]
        for read, think in self.layers:
            tokens = tokens + read(tokens, grid)
            tokens = tokens + think(tokens)
        return self.norm_out(self.proj_out(tokens))


class Resampler(Perceiver, ImageTokens):
    """`plus`, `plus-face`: learned queries (16) read the picture [P, 257, F] -> [P, 16, D]."""

    reads = GRID

    def __init__(self, count: int, hidden: int, **shape: int):
        super().__init__(hidden=hidden, **shape)
        self.count = count
        self.latents = nn.Parameter(torch.zeros(1, count, hidden))

    def forward(self, grid: Tensor) -> Tensor:
        return self.read(self.latents.expand(len(grid), -1, -1), grid)


class ResamplerAttention(nn.Module):
    """The queries attend to the picture and to each other."""

    def __init__(self, hidden: int, inner: int):
        super().__init__()
        self.heads = inner // HEAD
        self.norm1 = nn.LayerNorm(hidden)
        self.norm2 = nn.LayerNorm(hidden)
        self.to_q = nn.Linear(hidden, inner, bias=False)
        self.to_kv = nn.Linear(hidden, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, hidden, bias=False)

    def forward(self, tokens: Tensor, grid: Tensor) -> Tensor:
        """tokens [P, count, hidden], grid [P, 257, hidden] -> [P, count, hidden]."""
        tokens = self.norm2(tokens)
        k, v = self.to_kv(torch.cat([self.norm1(grid), tokens], dim=1)).chunk(2, dim=-1)
        return self.to_out(attend(self.to_q(tokens), k, v, self.heads))


def _feed_forward(hidden: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(hidden), nn.Linear(hidden, width, bias=False), nn.GELU(), nn.Linear(width, hidden, bias=False)
    )
