"""The frozen base model of a finetune, in diffusers' and transformers' classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moa_core.learned.moa import MoA, MoAConfig


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

    @property
    def picture_size(self) -> int:
        """Side in pixels of the pictures it was made for."""
        return 8 * self.unet.config.sample_size

    def fresh_moa(self, image_encoder: dict[str, Any], **others: Any) -> MoA:
        """A MoA that changes nothing yet; its image encoder (arguments of CLIPVisionConfig) has random weights.

        others: further fields of its MoAConfig.
        """
        config = MoAConfig.for_unet(
            self.unet.state_dict(),
            base=self.family,
            heads=_heads(self.unet),
            image_encoder=dict(image_encoder),
            **others,
        )
        return MoA.from_prior(self.unet.state_dict(), config)


def _heads(unet: nn.Module) -> int:
    """diffusers calls SD 1.x's number of heads attention_head_dim."""
    return unet.config.num_attention_heads or unet.config.attention_head_dim
