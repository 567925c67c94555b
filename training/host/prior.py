"""The cross-attentions of a diffusers U-Net as image experts use them."""

from __future__ import annotations

from collections.abc import Callable

from diffusers import UNet2DConditionModel

from moa_core.address import Address
from moa_core.attention import PriorAttention


def prior_of(unet: UNet2DConditionModel) -> Callable[[Address], PriorAttention]:
    def at(address: Address) -> PriorAttention:
        attention = unet.get_submodule(address.to_diffusers(unet.config.layers_per_block)).attn2
        return PriorAttention(attention.to_q, attention.to_k, attention.to_out[0], attention.heads)

    return at
