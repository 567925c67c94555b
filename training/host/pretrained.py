"""What a finetune starts from: a base model, and a MoA beside it that has a pretrained image encoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moa_core.learned.image_encoder import CLIP_VIT_L
from moa_core.learned.moa import MoA
from moa_core.learned.moa_file import MoAFileError, load_moa
from training.host.base import Base, BaseError, KLAutoencoder
from training.host.toy_base import load_toy


def fresh_moa(base: Base, image_encoder: Path, **others: Any) -> MoA:
    """A MoA that changes nothing yet, with a pretrained image encoder (a transformers folder). Raises BaseError.

    others: further fields of its MoAConfig.
    """
    from transformers import CLIPVisionModelWithProjection

    if not (image_encoder / "config.json").is_file():
        raise BaseError(
            f"model.image_encoder: {image_encoder} holds no config.json; expected the folder of a transformers "
            "CLIP vision model (for the toy world: python -m training.toy encoder)"
        )
    encoder = CLIPVisionModelWithProjection.from_pretrained(image_encoder, dtype=torch.float32, local_files_only=True)
    moa = base.fresh_moa({key: getattr(encoder.config, key) for key in (*CLIP_VIT_L, "hidden_act")}, **others)
    moa.image_encoder.model.load_state_dict(encoder.state_dict())
    return moa


def started_moa(base: Base, path: Path, timesteps: int) -> MoA:
    """The MoA of a file, to train it on below these timesteps. Raises BaseError where it is not for the base model."""
    try:
        moa = load_moa(path)
    except MoAFileError as error:
        raise BaseError(f"model.start: {error}") from error
    fresh = base.fresh_moa(moa.config.image_encoder, layers=moa.config.layers, router_hidden=moa.config.router_hidden)
    if moa.config.blocks != fresh.config.blocks or moa.config.heads != fresh.config.heads:
        raise BaseError(
            f"model.start: {path.name} was made for {moa.config.base} ({len(moa.config.blocks)} transformer blocks), "
            f"and model.base is {base.family} ({len(fresh.config.blocks)}), or is of other widths. Give the base "
            "model that it was trained beside"
        )
    moa.config = moa.mixture.config = replace(moa.config, timesteps=timesteps)
    return moa.requires_grad_(True).train()


def load_base(path: str | Path) -> Base:
    """A Stable Diffusion 1.x folder as diffusers saves it, or a toy checkpoint. Raises BaseError."""
    path = Path(path)
    if path.is_file():
        try:
            return load_toy(path)
        except Exception as error:
            raise BaseError(f"model.base: {path} is no toy checkpoint ({type(error).__name__}: {error})") from error
    if not (path / "unet" / "config.json").is_file():
        raise BaseError(
            f"model.base: expected a Stable Diffusion 1.5 folder in diffusers' format (unet, vae, text_encoder) or a "
            f"toy checkpoint, found {'nothing' if not path.exists() else 'no unet/config.json'} at {path}"
        )
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    local = {"local_files_only": True}
    return Base(
        UNet2DConditionModel.from_pretrained(path, subfolder="unet", torch_dtype=torch.float32, **local),
        CLIPTextModel.from_pretrained(path, subfolder="text_encoder", dtype=torch.float32, **local),
        KLAutoencoder(AutoencoderKL.from_pretrained(path, subfolder="vae", torch_dtype=torch.float32, **local)),
        "SD 1.5",
    )
