"""A Stable Diffusion 1.5 and a CLIP ViT-L/14 of the real size with random weights: sd15_folder.py FOLDER

In diffusers' and transformers' layout, fp16. As a script in a process of its own, so that its memory is its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from moa_core.image_encoder import CLIP_VIT_L


def main(folder: Path) -> None:
    torch.manual_seed(0)
    blocks = 4
    parts = {
        "sd15/unet": UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        "sd15/vae": AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * blocks,
            up_block_types=("UpDecoderBlock2D",) * blocks,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
        ),
        "sd15/text_encoder": CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        ),
        "clip": CLIPVisionModelWithProjection(CLIPVisionConfig(**CLIP_VIT_L)),
    }
    for name, model in parts.items():
        model.half().save_pretrained(folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
