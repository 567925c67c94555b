"""The frozen base model of a finetune, in diffusers' and transformers' classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moa_core.image_encoder import CLIP_VIT_L
from moa_core.moa import MoA, MoAConfig
from toy_world import shape


class BaseError(ValueError):
    """A sentence for the user: the file or folder, what was expected, what was found."""


class KLAutoencoder(nn.Module):
    """Stable Diffusion's autoencoder, its scale applied."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae

    def moments(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures [B, 3, H, W] in -1..1 -> mean and standard deviation of their latents, [B, 4, H / 8, W / 8] each."""
        chosen, scale = self.vae.encode(pictures).latent_dist, self.vae.config.scaling_factor
        return chosen.mean * scale, chosen.std * scale

    def encode(self, pictures: Tensor, noise: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in -1..1, noise [B, 4, H / 8, W / 8] -> latents of about unit variance."""
        mean, std = self.moments(pictures)
        return mean + std * noise

    def decode(self, latents: Tensor) -> Tensor:
        """[B, 4, h, w] -> [B, 3, 8h, 8w] in -1..1."""
        return self.vae.decode(latents / self.vae.config.scaling_factor).sample


@dataclass
class Base:
    """U-Net, text encoder and autoencoder (a KLAutoencoder or the toy's NarrowVAE); family: as MoA Loader shows it."""

    unet: nn.Module
    text_encoder: nn.Module
    autoencoder: nn.Module
    family: str

    def __post_init__(self) -> None:
        for part in (self.unet, self.text_encoder, self.autoencoder):
            part.eval().requires_grad_(False)

    def to(self, device: torch.device) -> Base:
        for part in (self.unet, self.text_encoder, self.autoencoder):
            part.to(device)
        return self

    def fresh_moa(self, image_encoder: Path, router_hidden: int) -> MoA:
        """A MoA that changes nothing yet, with a pretrained image encoder (a transformers folder)."""
        from transformers import CLIPVisionModelWithProjection

        if not (image_encoder / "config.json").is_file():
            raise BaseError(
                f"model.image_encoder: {image_encoder} holds no config.json; expected the folder of a transformers "
                "CLIP vision model (for the toy world: python -m training.toy encoder)"
            )
        encoder = CLIPVisionModelWithProjection.from_pretrained(
            image_encoder, dtype=torch.float32, local_files_only=True
        )
        config = MoAConfig.for_unet(
            self.unet.state_dict(),
            base=self.family,
            heads=_heads(self.unet),
            router_hidden=router_hidden,
            image_encoder={key: getattr(encoder.config, key) for key in (*CLIP_VIT_L, "hidden_act")},
        )
        moa = MoA.from_prior(self.unet.state_dict(), config)
        moa.image_encoder.model.load_state_dict(encoder.state_dict())
        return moa


def _heads(unet: nn.Module) -> int:
    """diffusers calls SD 1.x's number of heads attention_head_dim."""
    return unet.config.num_attention_heads or unet.config.attention_head_dim


def load_base(path: str | Path) -> Base:
    """A Stable Diffusion 1.x folder as diffusers saves it, or a toy checkpoint. Raises BaseError."""
    path = Path(path)
    if path.is_file():
        from training.toy.base import ToyBase
        from training.toy.vae import NarrowVAE

        try:
            toy = ToyBase.load(path)
            return Base(toy.unet, toy.text_encoder, NarrowVAE.of(toy.vae), shape.BASE)
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
