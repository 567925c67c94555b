"""What is finetuned, and the loss of one batch (eq. 11)."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from moa_core.address import Address
from moa_core.learned.moa import MoA
from moa_core.learned.unet_call import BoundTokens, UNetCall
from moa_core.routing.subject_area import mean_share, routed_layers
from training.config import Config, Loss
from training.data.batch import Batch, Chance, empty_ids
from training.finetune.losses import (
    masked_reconstruction,
    object_loss,
    router_loss,
    shares_inside_outside,
    with_margin,
)
from training.finetune.methods import METHODS
from training.finetune.watched_call import WatchedCall
from training.host.adapter import MoAUNet
from training.host.base import Base
from training.host.pretrained import fresh_moa, load_base, started_moa
from training.host.schedule import add_noise, min_snr


class Finetune(nn.Module):
    """The frozen base model and the MoA that learns beside it; one module, so that DDP wraps all of a step.

    Experts, routers, subject prompt and the last layers of the image encoder learn; nothing else does.
    call_type: what goes around the attention layers, where it is not MoA (methods.py).
    """

    def __init__(self, base: Base, moa: MoA, loss: Loss, encoder_layers: int, call_type: type[UNetCall] = WatchedCall):
        super().__init__()
        self.loss = loss
        self.unet = MoAUNet(base.unet, moa.mixture, call_type)
        self.text_encoder = base.text_encoder
        self.image_encoder = moa.image_encoder
        self.register_buffer("empty", empty_ids(), persistent=False)
        moa.image_encoder.requires_grad_(False)
        for part in moa.image_encoder.last_layers(encoder_layers):
            part.requires_grad_(True)

    def forward(self, latents: Tensor, batch: Batch, chance: Chance) -> dict[str, Tensor]:
        """latents [B, 4, h, w] -> `loss`, its parts, and the experts' share `inside` and `outside` the subjects."""
        masks = F.interpolate(batch.masks, latents.shape[2:], mode="area")  # [B, S, h, w]
        subjects = masks.sum(dim=1).clamp(max=1)  # [B, h, w]
        context = self.text_encoder(torch.where(chance.dropped[:, None], self.empty, batch.ids)).last_hidden_state
        rows, places = ((batch.positions >= 0) & ~chance.dropped[:, None]).nonzero(as_tuple=True)  # [K] each
        bound = None
        if len(rows):
            features = self.image_encoder(batch.references[rows, places])  # [K, F]
            bound = BoundTokens(rows, batch.positions[rows, places], features)
        noisy = add_noise(latents, chance.noise, chance.timestep)
        predicted = self.unet(noisy, chance.timestep, context, bound)

        call = self.unet.call
        gamma = self.loss.min_snr
        weights = min_snr(chance.timestep, gamma) if gamma else torch.ones_like(chance.timestep)
        share = mean_share(call.shares, tuple(latents.shape[2:]), self.unet.mixture.config.blocks)
        theirs = with_margin(subjects, self.loss.margin)
        area = theirs.where(chance.masked[:, None, None], 1.0)
        parts = {
            "reconstruction": masked_reconstruction(predicted, chance.noise, area, weights),
            "router": router_loss(share, theirs),
            "object": object_loss(self._localized(call.attention), masks[rows, places], rows, len(latents)),
        }
        total = parts["reconstruction"] + self.loss.router * parts["router"] + self.loss.object * parts["object"]
        inside, outside = shares_inside_outside(share.detach(), subjects)
        return {"loss": total, **{k: v.detach() for k, v in parts.items()}, "inside": inside, "outside": outside}

    def _localized(self, attention: dict[Address, Tensor]) -> dict[Address, Tensor]:
        """Of all blocks' attention to the bound tokens, what the object loss reads."""
        if self.loss.object_blocks == "all":
            return attention
        routed = routed_layers([(address, "attn2") for address in attention], self.unet.mixture.config.blocks)
        return {address: attention[address] for address, _ in routed}


def build(config: Config) -> tuple[Base, MoA, Finetune]:
    """The base model, a fresh MoA, and both as what is trained. Raises BaseError."""
    base = load_base(config.model.base)
    if config.run.precision == "bf16" and not torch.cuda.is_available():
        base.unet.set_attn_processor(AttnProcessor())  # as the experts' plain_attention
    if config.model.start:
        moa = started_moa(base, Path(config.model.start), config.loss.timesteps)
    else:
        shape = {"router_hidden": config.model.router_hidden, "timesteps": config.loss.timesteps}
        moa = fresh_moa(base, Path(config.model.image_encoder), **shape)
    method = METHODS[config.model.method]
    method.prepare(moa)
    return base, moa, Finetune(base, moa, config.loss, config.model.trainable_encoder_layers, method.training_call)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
