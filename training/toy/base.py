"""The toy base model in diffusers and transformers classes, and its single-file checkpoint."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from moa_core.moa import MoA, MoAConfig
from toy_world import shape
from training.ldm_names import unet_to_ldm
from training.toy.vae import NarrowVAE

UNET, TEXT, VAE = "model.diffusion_model.", "cond_stage_model.transformer.text_model.", "first_stage_model."


@dataclass
class ToyBase:
    """U-Net, text encoder and autoencoder of the toy family."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    vae: AutoencoderTiny

    @classmethod
    def random(cls, seed: int = 0) -> ToyBase:
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
        text_encoder = CLIPTextModel(CLIPTextConfig(**shape.TEXT_ENCODER))
        return cls(unet.eval(), text_encoder.eval(), NarrowVAE().widen())

    def fresh_moa(self) -> MoA:
        """A MoA for this base that changes nothing yet."""
        config = MoAConfig.for_unet(
            self.unet.state_dict(),
            base=shape.BASE,
            heads=shape.HEADS,
            image_encoder=dict(shape.IMAGE_ENCODER),
        )
        return MoA.from_prior(self.unet.state_dict(), config)

    def save(self, path: str | os.PathLike, dtype: torch.dtype = torch.float16) -> None:
        """One ordinary checkpoint, which ComfyUI's CheckpointLoaderSimple reads; whole or not at all."""
        path = Path(path)
        weights = {name: weight.detach().to("cpu", dtype).contiguous() for name, weight in self._to_ldm().items()}
        unfinished = path.with_name(path.name + ".unfinished")
        try:
            save_file(weights, unfinished, {"format": "pt"})
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike) -> ToyBase:
        """Read a checkpoint written by `save`, as float32."""
        base, weights = cls.random(), load_file(path)
        for name, own in base._to_ldm().items():
            own.data.copy_(weights[name])
        return base

    def _to_ldm(self) -> dict[str, Tensor]:
        """All weights under the names of an LDM checkpoint with a TAESD inside; the tensors are the models' own."""
        unet = unet_to_ldm(self.unet.state_dict(), shape.LAYERS_PER_BLOCK)
        text = {name.removeprefix("text_model."): weight for name, weight in self.text_encoder.state_dict().items()}
        vae = {"vae_scale": torch.tensor(1.0), "vae_shift": torch.tensor(0.0)}
        for name, weight in self.vae.state_dict().items():
            side, _, number, rest = name.split(".", 3)
            # The decoder's first layer, a clamp without weights, is counted by TAESD and not by diffusers.
            vae[f"taesd_{side}.{int(number) + (side == 'decoder')}.{rest}"] = weight
        parts = ((UNET, unet), (TEXT, text), (VAE, vae))
        return {prefix + name: weight for prefix, part in parts for name, weight in part.items()}
