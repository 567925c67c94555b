"""A style LoRA for the toy base model: its people cut out as stickers."""

from __future__ import annotations

import numpy as np
import torch

from toy_world.draw import draw_scene
from toy_world.shape import IMAGE_SIZE
from toy_world.sticker import stickers
from toy_world.world import Scene
from training.toy.pretrain.loop import Plan, base_of
from training.toy.pretrain.lora import LoRADenoiser, save_lora
from training.toy.pretrain.on_base import Scenes, train_on_base
from training.toy.pretrain.scenes import rendered
from training.toy.pretrain.unet import DROPPED, PROMPTS

RANK = 4
LAYERS = ("to_", "proj_", "conv1", "conv2")
FILE = "moa-toy-sticker.safetensors"


def sticker(scene: Scene, size: int) -> np.ndarray:
    """[size, size, 3]."""
    return np.asarray(stickers(*draw_scene(scene, size)))


def train_style_lora(plan: Plan) -> None:
    """Train a LoRA of another drawing style on the base model, and write it as ComfyUI and diffusers read it."""
    base, pictures = base_of(plan), rendered(plan, IMAGE_SIZE, sticker)
    torch.manual_seed(plan.seed)
    scenes = Scenes.of(base, torch.from_numpy(np.array(pictures.pixels)), pictures.captions)
    model = LoRADenoiser(base, RANK, LAYERS)
    train_on_base(plan, "style-lora", base, model, scenes, DROPPED, PROMPTS)
    save_lora(model.unet, plan.run / FILE)
