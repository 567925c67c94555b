"""The image encoder: a CLIP vision model of any size, which turns reference pictures into features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CLIP_VIT_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "projection_dim": 768,
}
"""CLIP ViT-L/14, the paper's image encoder, as arguments of transformers' CLIPVisionConfig."""


class ImageEncoder(nn.Module):
    """transformers' CLIPVisionModelWithProjection behind the two things that MoA needs of it."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        # Here and not above: transformers takes seconds to import, and a pack must not slow its host's start.
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        self.model = CLIPVisionModelWithProjection(CLIPVisionConfig(**config))
        self.size: int = config["image_size"]

    def forward(self, pixels: Tensor) -> Tensor:
        """Prepared references [P, 3, size, size] -> features [P, F]."""
        return self.model(pixel_values=pixels).image_embeds

    def last_layers(self, count: int) -> list[nn.Module]:
        """The last `count` transformer layers and all that follows them; none of it for 0. What training may change."""
        if count == 0:
            return []
        vision = self.model.vision_model
        layers = vision.encoder.layers
        return [*layers[len(layers) - count :], vision.post_layernorm, self.model.visual_projection]

    def fill_position_ids(self) -> None:
        """Give real values to the one thing that no file holds: 0, 1, 2, ... after a build on the meta device."""
        for module in self.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_meta:
                    setattr(module, name, torch.arange(buffer.shape[-1]).expand(buffer.shape))
