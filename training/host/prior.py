"""The cross-attentions of a diffusers U-Net as adapters use them."""

from __future__ import annotations

from diffusers import UNet2DConditionModel

from moa_core.address import Address
from moa_core.attention import Prior, PriorAttention


def prior_of(unet: UNet2DConditionModel) -> Prior:
    def at(address: Address) -> PriorAttention:
        name = f"{address.to_diffusers(unet.config.layers_per_block)}.attn2"
        own = unet.get_submodule(name)
        return PriorAttention(name, own.to_q, own.to_k, own.to_v, own.to_out[0], own.heads)

    return at
