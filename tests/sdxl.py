"""SDXL's U-Net in diffusers with random weights, at its real size or narrow."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel

TINY = {"block_out_channels": (32, 64, 128), "attention_head_dim": (1, 1, 2)}
"""All 70 transformers, a tenth as wide; heads and the text are as wide as they are."""


def sdxl_unet(block_out_channels=(320, 640, 1280), attention_head_dim=(5, 10, 20)) -> UNet2DConditionModel:
    """attention_head_dim: diffusers' name for the number of heads."""
    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=block_out_channels,
        attention_head_dim=attention_head_dim,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=1280 + 6 * 256,
    ).eval()


def added_conditions(rows: int) -> dict[str, torch.Tensor]:
    """What SDXL is told besides text: its pooled embedding, and sizes (original, crop, target; height before width)."""
    pooled = torch.randn(rows, 1280, generator=torch.Generator().manual_seed(4))
    sizes = torch.tensor([1024.0, 768.0, 0.0, 0.0, 1024.0, 768.0])
    return {"text_embeds": pooled, "time_ids": sizes.expand(rows, -1)}
