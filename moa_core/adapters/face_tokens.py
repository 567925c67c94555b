"""Image tokens of IP-Adapters that know a person by the face: by an embedding of insightface, 512 wide.

Names of modules are those of the published files. The tokens of several photos stand one after the other.
"""

from __future__ import annotations

from torch import Tensor, nn

from .image_tokens import GRID, ImageTokens, Perceiver, Resampler

NORMED, RAW = "normed_embedding", "embedding"
"""The two forms of a face's embedding, by insightface's names for them."""


class FaceTokens(ImageTokens):
    """`faceid`, `faceid-portrait`: the embedding [P, 512] -> 4 or 16 tokens [P, n, D]."""

    reads, face = None, NORMED

    def __init__(self, face_width: int, inner: int, count: int, dim: int):
        super().__init__()
        self.face_width, self.width, self.count, self.dim = face_width, 0, count, dim
        self.proj = nn.Sequential(nn.Linear(face_width, inner), nn.GELU(), nn.Linear(inner, count * dim))
        self.norm = nn.LayerNorm(dim)

    def forward(self, face: Tensor) -> Tensor:
        return self.norm(self.proj(face).unflatten(-1, (self.count, self.dim)))


class FacePlusTokens(FaceTokens):
    """`faceid-plus` and `faceid-plusv2`: tokens of the embedding read CLIP's picture of the face [P, 257, F].

    What they read stands in their place, or, in v2, is added to them.
    """

    reads = GRID

    def __init__(self, face_width: int, inner: int, count: int, perceiver: Perceiver, is_v2: bool):
        super().__init__(face_width, inner, count, perceiver.dim)
        self.width, self.is_v2 = perceiver.width, is_v2
        self.perceiver_resampler = perceiver

    def forward(self, face: Tensor, grid: Tensor) -> Tensor:
        tokens = super().forward(face)  # [P, n, D]
        read = self.perceiver_resampler.read(tokens, grid)
        return tokens + read if self.is_v2 else read


class FaceResampler(Resampler):
    """`portrait_sdxl_unnorm`, InstantID: learned queries (16) read the embedding [P, 512], not normalized."""

    reads, face = None, RAW

    def __init__(self, **shape: int):
        super().__init__(**shape)
        self.face_width = self.width

    def forward(self, face: Tensor) -> Tensor:
        return super().forward(face[:, None])
