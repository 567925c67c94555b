"""A style LoRA for the toy base model: its people cut out as stickers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moa_core.files.whole_file import whole
from toy_world.draw import draw_scene
from toy_world.shape import IMAGE_SIZE
from toy_world.sticker import stickers
from toy_world.world import Scene
from training.host.base import Base
from training.toy.pretrain.loop import Plan, base_of, plain_attention
from training.toy.pretrain.low_rank import low_rank_updates, with_low_rank
from training.toy.pretrain.on_base import Scenes, train_on_base
from training.toy.pretrain.scenes import rendered
from training.toy.pretrain.unet import DROPPED, PROMPTS

RANK = 4
FILE = "moa-toy-sticker.safetensors"


class StyledDenoiser(nn.Module):
    """The base model with the LoRA."""

    def __init__(self, base: Base):
        super().__init__()
        self.unet = with_fresh_lora(base.unet)
        self.text_encoder = base.text_encoder
        plain_attention(self.unet)
        self.to(memory_format=torch.channels_last)

    def forward(self, latents: Tensor, timestep: Tensor, ids: Tensor) -> Tensor:
        """latents [B, 4, h, w], timestep [B], token ids [B, 77] -> predicted noise [B, 4, h, w]."""
        return self.unet(latents, timestep, self.text_encoder(ids).last_hidden_state).sample


def with_fresh_lora(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The U-Net with a LoRA that changes nothing yet."""
    names = ("to_", "proj_", "conv1", "conv2")
    return with_low_rank(unet, RANK, lambda name: any(part in name for part in names))


def sticker(scene: Scene, size: int) -> np.ndarray:
    """[size, size, 3]."""
    return np.asarray(stickers(*draw_scene(scene, size)))


def train_style_lora(plan: Plan) -> None:
    """Train a LoRA of another drawing style on the base model, and write it as ComfyUI and diffusers read it."""
    base, pictures = base_of(plan), rendered(plan, IMAGE_SIZE, sticker)
    torch.manual_seed(plan.seed)
    scenes = Scenes.of(base, torch.from_numpy(np.array(pictures.pixels)), pictures.captions)
    model = StyledDenoiser(base)
    train_on_base(plan, "style-lora", base, model, scenes, DROPPED, PROMPTS)
    save_lora(model.unet, plan.run / FILE)


def save_lora(unet: nn.Module, path: Path) -> None:
    """Under the names of kohya's trainer, in float16; whole or not at all."""
    weights = {}
    for layer, up, down in _named(unet):
        weights[f"{layer}.lora_up.weight"], weights[f"{layer}.lora_down.weight"] = up, down
        weights[f"{layer}.alpha"] = torch.tensor(float(down.shape[0]))
    with whole(path) as unfinished:
        save_file({k: v.detach().cpu().half().contiguous() for k, v in weights.items()}, unfinished, {"format": "pt"})


def load_lora(unet: UNet2DConditionModel, path: Path) -> UNet2DConditionModel:
    """The U-Net with what `save_lora` wrote."""
    styled, stored = with_fresh_lora(unet), load_file(path)
    for layer, up, down in _named(styled):
        up.data.copy_(stored[f"{layer}.lora_up.weight"])
        down.data.copy_(stored[f"{layer}.lora_down.weight"])
    return styled


def _named(unet: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Every updated layer by its name in the file, and the factors up and down."""
    for name, up, down in low_rank_updates(unet):
        yield f"lora_unet_{name.replace('.', '_')}", up, down
