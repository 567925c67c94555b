"""PhotoMaker (Li et al., 2023): a word's token fused with what an encoder of its own makes of a photo.

Names of modules are those of the published files. A word stands once for each photo, and each is fused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class IdEncoder(nn.Module):
    """A finetuned CLIP vision model with a projection for each of SDXL's text encoders, and the fusion."""

    def __init__(self, vision: dict[str, Any], widths: tuple[int, int]):
        """vision: arguments of transformers' CLIPVisionConfig; widths: of the two text encoders."""
        super().__init__()
        # Here and not above: transformers takes seconds to import, and a pack must not slow its host's start.
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        self.size: int = vision["image_size"]
        self.clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**vision, projection_dim=widths[0]))
        self.visual_projection_2 = nn.Linear(vision["hidden_size"], widths[1], bias=False)
        self.fuse_module = Fusion(sum(widths))

    def forward(self, pixels: Tensor) -> Tensor:
        """Prepared photos [P, 3, size, size] -> [P, D], as wide as the text."""
        seen = self.clip.vision_model(pixel_values=pixels).pooler_output
        return torch.cat([self.clip.visual_projection(seen), self.visual_projection_2(seen)], dim=-1)

    @property
    def width(self) -> int:
        """D, of an identity and of the text."""
        return self.fuse_module.layer_norm.weight.shape[0]

    def fused(self, text: Tensor, places: Sequence[int], identities: Tensor, weight: float) -> Tensor:
        """A text [1, T, D] whose tokens at P places are fused with identities [P, D], as much as weight says."""
        there, device = text[0, places], self.fuse_module.layer_norm.weight.device
        made = self.fuse_module(there.float().to(device), identities.to(device)).to(text)
        changed = text.clone()
        changed[0, places] = torch.lerp(there, made, weight)
        return changed


class Fusion(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.mlp1, self.mlp2 = Thought(2 * dim, dim), Thought(dim, dim)
        self.layer_norm = nn.LayerNorm(dim)

    def forward(self, text: Tensor, identity: Tensor) -> Tensor:
        """Both [P, D] -> [P, D]."""
        fused = text + self.mlp1(torch.cat([text, identity], dim=-1))
        return self.layer_norm(fused + self.mlp2(fused))


class Thought(nn.Module):
    def __init__(self, width: int, dim: int):
        super().__init__()
        self.layernorm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(self.layernorm(x))))
