"""A LoRA for the toy base model's U-Net: what learns, and the file that ComfyUI and diffusers read."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

from moa_core.files.whole_file import whole
from training.host.base import Base
from training.host.lora import ALPHA, DOWN, UP, in_file
from training.toy.pretrain.loop import plain_attention
from training.toy.pretrain.low_rank import low_rank_updates, with_low_rank


class LoRADenoiser(nn.Module):
    """The base model with a fresh LoRA."""

    def __init__(self, base: Base, rank: int, parts: tuple[str, ...]):
        """parts: of the names of the layers that it changes."""
        super().__init__()
        self.unet = with_fresh_lora(base.unet, rank, parts)
        self.text_encoder = base.text_encoder
        plain_attention(self.unet)
        self.to(memory_format=torch.channels_last)

    def forward(self, latents: Tensor, timestep: Tensor, ids: Tensor) -> Tensor:
        """latents [B, 4, h, w], timestep [B], token ids [B, 77] -> predicted noise [B, 4, h, w]."""
        return self.unet(latents, timestep, self.text_encoder(ids).last_hidden_state).sample


def with_fresh_lora(unet: UNet2DConditionModel, rank: int, parts: tuple[str, ...]) -> UNet2DConditionModel:
    """The U-Net with a LoRA that changes nothing yet."""
    return with_low_rank(unet, rank, lambda name: any(part in name for part in parts))


def save_lora(unet: nn.Module, path: Path) -> None:
    """Under the names of kohya's trainer, in float16; whole or not at all."""
    weights = {}
    for name, up, down in low_rank_updates(unet):
        layer = in_file(name)
        weights[layer + UP], weights[layer + DOWN] = up, down
        weights[layer + ALPHA] = torch.tensor(float(down.shape[0]))
    with whole(path) as unfinished:
        save_file({k: v.detach().cpu().half().contiguous() for k, v in weights.items()}, unfinished, {"format": "pt"})
