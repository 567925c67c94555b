"""The toy base model, and its single-file checkpoint."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from moa_core.files.whole_file import whole
from toy_world import shape
from training.host.base import Base
from training.host.ldm_names import unet_to_ldm
from training.host.narrow_vae import NarrowVAE

UNET, TEXT, VAE = "model.diffusion_model.", "cond_stage_model.transformer.text_model.", "first_stage_model."


def random_toy(seed: int = 0) -> Base:
    """Untrained, from a seed."""
    torch.manual_seed(seed)
    levels = len(shape.UNET_CHANNELS)
    unet = UNet2DConditionModel(
        sample_size=shape.IMAGE_SIZE // 8,
        block_out_channels=shape.UNET_CHANNELS,
        layers_per_block=shape.LAYERS_PER_BLOCK,
        attention_head_dim=shape.HEADS,  # diffusers' name for the number of heads
        cross_attention_dim=shape.TEXT_ENCODER["hidden_size"],
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
    )
    return Base(unet, CLIPTextModel(CLIPTextConfig(**shape.TEXT_ENCODER)), NarrowVAE(), shape.BASE)


def save_toy(base: Base, path: str | os.PathLike, dtype: torch.dtype = torch.float16) -> None:
    """One ordinary checkpoint, which ComfyUI's CheckpointLoaderSimple reads; whole or not at all."""
    weights = _to_ldm(base, base.autoencoder.widen())
    stored = {name: weight.detach().to("cpu", dtype).contiguous() for name, weight in weights.items()}
    with whole(Path(path)) as unfinished:
        save_file(stored, unfinished, {"format": "pt"})


def load_toy(path: str | os.PathLike) -> Base:
    """Read a checkpoint written by `save_toy`, as float32."""
    base, wide, stored = random_toy(), AutoencoderTiny(), load_file(path)
    for name, own in _to_ldm(base, wide).items():
        own.data.copy_(stored[name])
    return Base(base.unet, base.text_encoder, NarrowVAE.of(wide), base.family)


def _to_ldm(base: Base, wide: AutoencoderTiny) -> dict[str, Tensor]:
    """All weights under the names of an LDM checkpoint with a TAESD inside; the tensors are the models' own."""
    unet = unet_to_ldm(base.unet.state_dict(), shape.LAYERS_PER_BLOCK)
    text = {name.removeprefix("text_model."): weight for name, weight in base.text_encoder.state_dict().items()}
    vae = {"vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}
    for name, weight in wide.state_dict().items():
        side, _, number, rest = name.split(".", 3)
        # The decoder's first layer, a clamp without weights, is counted by TAESD and not by diffusers.
        vae[f"taesd_{side}.{int(number) + (side == 'decoder')}.{rest}"] = weight
    parts = ((UNET, unet), (TEXT, text), (VAE, vae))
    return {prefix + name: weight for prefix, part in parts for name, weight in part.items()}
