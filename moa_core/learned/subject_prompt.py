"""The subject prompt: text embeddings of bound tokens, replaced per layer and timestep (eq. 8).

The paper calls it the multimodal prompt, and its position encoding the space-time conditioning.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

TIME_FEATURES = 64


class SubjectPrompt(nn.Module):
    """text + MLP(concat(image feature, text) + PE(t, l)).

    The paper's MLP gives the new embedding outright; here it gives the difference from the text
    embedding, with a last layer that starts at zero, so that a fresh module is the identity.
    """

    def __init__(self, feature_dim: int, text_dim: int, layers: int, operations: Any = nn, **factory: Any):
        super().__init__()
        width = feature_dim + text_dim
        self.layers = layers
        self.norm = operations.LayerNorm(feature_dim, **factory)
        self.position = operations.Linear(TIME_FEATURES + layers, width, **factory)
        self.mlp = nn.Sequential(
            operations.LayerNorm(width, **factory),
            operations.Linear(width, width, **factory),
            nn.GELU(),
            operations.Linear(width, text_dim, **factory),
        )

    def forward(self, feature: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        """For K bound tokens: feature [K, F], text [K, D], timestep [K] (0 to 999) -> [L, K, D]."""
        x = torch.cat([self.norm(feature), text], dim=-1)  # [K, F + D]
        time = _sinusoids(timestep).to(x).expand(self.layers, -1, -1)  # [L, K, TIME_FEATURES]
        layer = torch.eye(self.layers, dtype=x.dtype, device=x.device)[:, None].expand(-1, x.shape[0], -1)  # [L, K, L]
        position = self.position(torch.cat([time, layer], dim=-1))  # [L, K, F + D]: PE(t, l), learned
        return text + self.mlp(x + position)

    @staticmethod
    def for_layers(position: Tensor, layers: list[int]) -> Tensor:
        """The weight of `position` that knows these of its layers alone."""
        return torch.cat([position[:, :TIME_FEATURES], position[:, TIME_FEATURES:][:, layers]], dim=1)

    def make_identity(self) -> None:
        nn.init.zeros_(self.mlp[-1].weight)
        nn.init.zeros_(self.mlp[-1].bias)


def _sinusoids(timestep: Tensor) -> Tensor:
    """[K] -> [K, TIME_FEATURES], the diffusion model's own timestep features."""
    half = TIME_FEATURES // 2
    frequency = torch.exp(-math.log(10000.0) * torch.arange(half, device=timestep.device) / half)
    angle = timestep.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)
