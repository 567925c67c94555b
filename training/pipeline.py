"""Sampling with a MoA in diffusers: the default host where there is no ComfyUI."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderTiny, UniPCMultistepScheduler
from torch import Tensor
from transformers import CLIPTextModel

from moa_core.binding import BoundPrompt
from moa_core.moa import MoA
from moa_core.reference import prepare_reference
from moa_core.subject import Subject
from moa_core.trace import Trace
from moa_core.unet_call import BoundTokens
from training.adapter import MoAUNet
from training.tokenizer import bind_prompt, tokenize


@dataclass
class MoAPipeline:
    """unet holds base U-Net and mixture; the text encoder and the autoencoder are the base model's."""

    unet: MoAUNet
    text_encoder: CLIPTextModel
    vae: AutoencoderTiny
    moa: MoA

    def encode_subject(self, pictures: Tensor, word: str, masks: Tensor | None = None) -> Subject:
        """Pictures [P, H, W, 3] in 0..1 of one person, masks [P, H, W] -> a subject."""
        own_masks = [None] * len(pictures) if masks is None else masks
        size = self.moa.image_encoder.size
        prepared = [prepare_reference(p, m, size) for p, m in zip(pictures, own_masks, strict=True)]
        return Subject(self.moa.encode(torch.stack(prepared))[None], word, word)

    def encode_prompt(self, prompt: str) -> Tensor:
        """[1, T, D]."""
        return self.text_encoder(torch.tensor([tokenize(prompt)])).last_hidden_state

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        subjects: list[Subject],
        negative: str = "",
        steps: int = 20,
        cfg: float = 7.0,
        seed: int = 0,
        strength: float = 1.0,
        sparse: bool = True,
        batch: int = 1,
    ) -> tuple[Tensor, Trace]:
        """Pictures [B, H, W, 3] in 0..1, and where the routers put the subjects."""
        bound = bind_prompt(prompt, subjects)
        context = torch.cat([self.encode_prompt(p).expand(batch, -1, -1) for p in (prompt, negative)])  # [2B, T, D]
        side = self.unet.unet.config.sample_size
        latents = torch.randn(batch, 4, side, side, generator=torch.Generator().manual_seed(seed))
        scheduler = _scheduler()
        scheduler.set_timesteps(steps)
        trace = Trace((side, side))
        for t in scheduler.timesteps:
            timestep = t.float().expand(2 * batch)
            tokens = _bound_tokens(bound, batch)
            noise = self.unet(torch.cat([latents] * 2), timestep, context, tokens, strength, sparse)
            positive, negative_noise = noise.chunk(2)
            latents = scheduler.step(negative_noise + cfg * (positive - negative_noise), t, latents).prev_sample
            if self.unet.call is not None:
                trace.add(float(t), {layer: share[:batch] for layer, share in self.unet.call.shares.items()})
        pictures = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return (pictures / 2 + 0.5).clamp(0, 1).movedim(1, -1), trace


def _bound_tokens(prompt: BoundPrompt, batch: int) -> BoundTokens | None:
    return BoundTokens.stack(
        [(row, b.position, b.subject.feature(row)) for row in range(batch) for b in prompt.bindings]
    )


def _scheduler() -> UniPCMultistepScheduler:
    """UniPC, the paper's sampler, over SD's noise schedule."""
    return UniPCMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="epsilon"
    )
