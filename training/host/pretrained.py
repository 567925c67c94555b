"""What a finetune starts from: a base model, and a MoA beside it that has a pretrained image encoder."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import CLIPTextModel, CLIPVisionModelWithProjection

from moa_core.learned.image_encoder import CLIP_VIT_L
from moa_core.learned.moa import MoA
from moa_core.learned.moa_file import MoAFileError, load_moa
from training.host import sd15
from training.host.base import Base, BaseError, KLAutoencoder
from training.host.toy_base import load_toy

SD15, TEXT_WIDTH = "SD 1.5", 768
OTHERS = {1024: "Stable Diffusion 2", 2048: "SDXL"}
"""Other base models, by the width of their text embeddings."""
NEWER = {"joint_blocks.": "Stable Diffusion 3", "double_blocks.": "Flux"}
"""Those that have no U-Net, by what the names of their weights hold."""
LATENT_CHANNELS = 4
FIRST_KEY = "model.diffusion_model.input_blocks.0.0.weight"
LAST_TEXT_KEY = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
TEXT, TOY_AUTOENCODER = "cond_stage_model.transformer.text_model.", "first_stage_model.taesd_"


def fresh_moa(base: Base, image_encoder: Path, **others: Any) -> MoA:
    """A MoA that changes nothing yet, with a pretrained image encoder (a transformers folder). Raises BaseError.

    others: further fields of its MoAConfig.
    """
    if not (image_encoder / "config.json").is_file():
        raise BaseError(
            f"model.image_encoder: {image_encoder} holds no config.json; expected the folder of a transformers "
            "CLIP vision model (for the toy world: python -m training.toy encoder)"
        )
    encoder = _read_part("model.image_encoder", CLIPVisionModelWithProjection, image_encoder)
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
    """A Stable Diffusion 1.x folder as diffusers saves it, or one .safetensors file of it, or a toy checkpoint.

    Raises BaseError.
    """
    path = Path(path)
    if path.is_file():
        return _load_file(path)
    if not (path / "unet" / "config.json").is_file():
        raise BaseError(
            f"model.base: expected a Stable Diffusion 1.5 folder in diffusers' format (unet, vae, text_encoder) or a "
            f"checkpoint, found {'nothing' if not path.exists() else 'no unet/config.json'} at {path}"
        )
    try:
        config = json.loads((path / "unet" / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseError(f"model.base: {path / 'unet' / 'config.json'} cannot be read: {error}") from error
    _check_family(path, config.get("cross_attention_dim"), config.get("in_channels", LATENT_CHANNELS))
    parts = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    loaded = {name: _read_part("model.base", kind, path / name) for name, kind in parts.items()}
    return Base(loaded["unet"], loaded["text_encoder"], KLAutoencoder(loaded["vae"]), SD15)


def _read_part(key: str, kind: type, folder: Path) -> nn.Module:
    """One model of its library, in float32, from a folder.

    key: of the configuration, which BaseError names.
    """
    if not folder.is_dir():
        raise BaseError(f"{key}: the folder {folder} is missing")
    try:
        model, info = read_model(kind, folder, variant=_variant(folder), output_loading_info=True)
    except ValueError as error:
        raise BaseError(f"{key}: {error}") from error
    if missing := sorted(info["missing_keys"]):
        raise BaseError(
            f"{key}: {folder} lacks {len(missing)} weights of a {kind.__name__}, such as {missing[0]}: it is damaged, "
            "or another model"
        )
    return model.float()


def read_model(kind: type, folder: Path, **options: Any) -> Any:
    """What the class's own `from_pretrained` makes of a folder. Raises ValueError."""
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        why = str(error).strip().split("\n")[0].rstrip(".")
        raise ValueError(
            f"{folder} cannot be read as a {kind.__name__} ({type(error).__name__}: {why}): fetch it again"
        ) from error


def _variant(part: Path) -> str | None:
    """What stands between the name of a part's weights and their ending, where there are no others: `fp16`."""
    names = [file.name.split(".") for file in part.glob("*") if file.suffix in (".safetensors", ".bin")]
    variants = {name[1] if len(name) > 2 and "-of-" not in name[-2] else None for name in names}
    return None if None in variants else next(iter(sorted(variants)), None)


def _load_file(path: Path) -> Base:
    """One file: the toy world's checkpoint, or one of Stable Diffusion 1.x with the original names of its weights."""
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            shapes = {key: file.get_slice(key).get_shape() for key in (LAST_TEXT_KEY, FIRST_KEY) if key in names}
    except (SafetensorError, OSError) as error:
        raise BaseError(
            f"model.base: {path} is no .safetensors checkpoint ({type(error).__name__}: {error}). In place of a .ckpt "
            "file take the .safetensors one, or diffusers' folder"
        ) from error
    if any(name.startswith(TOY_AUTOENCODER) for name in names):
        try:
            return load_toy(path)
        except Exception as error:
            raise BaseError(f"model.base: {path} is no toy checkpoint ({type(error).__name__}: {error})") from error
    for mark, family in NEWER.items():
        if any(mark in name for name in names):
            raise _other_family(path, family)
    channels = shapes[FIRST_KEY][1] if FIRST_KEY in shapes else LATENT_CHANNELS
    _check_family(path, shapes[LAST_TEXT_KEY][1] if LAST_TEXT_KEY in shapes else None, channels)
    wanted = {"first_stage_model.": "autoencoder", "cond_stage_model.": "text encoder"}
    missing = [what for prefix, what in wanted.items() if not any(name.startswith(prefix) for name in names)]
    if missing:
        raise BaseError(f"model.base: {path} holds no {' and no '.join(missing)}: give a whole checkpoint")
    try:
        return _load_sd15(path)
    except Exception as error:  # whatever diffusers makes of names and shapes that it does not expect
        raise BaseError(
            f"model.base: {path} is no Stable Diffusion 1.5 checkpoint that diffusers can read "
            f"({type(error).__name__}: {error})"
        ) from error


def _load_sd15(path: Path) -> Base:
    """diffusers knows the names; the shapes are Stable Diffusion 1.5's, so that nothing is to be looked up on a hub."""
    with tempfile.TemporaryDirectory() as shapes:
        with torch.device("meta"):
            for name, part in (("unet", sd15.unet()), ("vae", sd15.autoencoder())):
                part.save_config(Path(shapes) / name)
        options = {"config": shapes, "torch_dtype": torch.float32, "local_files_only": True}
        unet = UNet2DConditionModel.from_single_file(path, subfolder="unet", **options)
        vae = AutoencoderKL.from_single_file(path, subfolder="vae", **options)
    text_encoder, stored = sd15.text_encoder(), {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            if name.startswith(TEXT):
                stored[name.removeprefix(TEXT)] = file.get_tensor(name)
    own = text_encoder.state_dict()
    for name, weight in own.items():
        weight.copy_(stored[name.removeprefix("text_model.")])
    return Base(unet, text_encoder, KLAutoencoder(vae), SD15)


def _check_family(path: Path, text_width: int | None, channels: int) -> None:
    """Raises BaseError for a base model that reads other text embeddings or latents than Stable Diffusion 1.x."""
    if text_width != TEXT_WIDTH:
        raise _other_family(path, OTHERS.get(text_width, "of a family that this training does not know"))
    if channels != LATENT_CHANNELS:
        raise BaseError(
            f"model.base: {path} takes {channels} channels, as models for inpainting and for editing do; this training "
            f"is for those that take the {LATENT_CHANNELS} of a latent alone. Give the ordinary model"
        )


def _other_family(path: Path, family: str) -> BaseError:
    return BaseError(
        f"model.base: {path} is {family}; this training is for Stable Diffusion 1.x, whose text embeddings are "
        f"{TEXT_WIDTH} wide. Give one of those"
    )
