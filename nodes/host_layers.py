"""The attention layers of the host's U-Net: which there are, what they compute, and ours beside them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from comfy.ldm.modules import attention as host_attention
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..moa_core.adapters.run import ImageCall
from ..moa_core.address import Address, BlockShape
from ..moa_core.attention import Attend, PriorAttention
from ..moa_core.learned.moa import ATTENTIONS
from ..moa_core.learned.unet_call import UNetCall


def unet_blocks(model: ModelPatcher) -> dict[Address, BlockShape]:
    """Transformer blocks of the model's U-Net; none for a model that is no U-Net."""
    blocks = {}
    for name, module in model.model.diffusion_model.named_modules():
        address = Address.from_ldm(name)
        if address and isinstance(module, BasicTransformerBlock) and module.attn2 is not None:
            blocks[address] = BlockShape(module.attn1.to_q.in_features, module.attn2.to_k.in_features)
    return blocks


def host_attend(transformer_options: dict) -> Attend:
    """The attention of the host's own layers, with whatever another node has put in its place."""

    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        return host_attention.optimized_attention(q, k, v, heads, transformer_options=transformer_options)

    return attend


def host_prior(unet: torch.nn.Module) -> Callable[[Address], PriorAttention]:
    """The U-Net's own cross-attention at an address."""

    def at(address: Address) -> PriorAttention:
        attention = unet.get_submodule(address.to_ldm()).attn2
        return PriorAttention(attention.to_q, attention.to_k, attention.to_out, attention.heads)

    return at


def with_patches(patches: dict, call: UNetCall | ImageCall) -> dict:
    """The attention patches of one U-Net call with ours: first in, last out."""
    patches = dict(patches)
    held: dict[str, Tensor] = {}

    def hold(attention: str):
        def before(h, context, value, extra_options):
            held[attention] = h
            return h, context, value

        return before

    def mix(attention: str):
        def after(prior, extra_options):
            kind, number = extra_options["block"]
            address = Address(kind, number, extra_options["block_index"])
            size = tuple(extra_options["activations_shape"][-2:])  # its own: others may change it (Deep Shrink)
            return call.mix(address, attention, held.pop(attention), prior, size)

        return after

    for attention in ATTENTIONS:
        before, after = f"{attention}_patch", f"{attention}_output_patch"
        patches[before] = [hold(attention), *patches.get(before, [])]
        patches[after] = [*patches.get(after, []), mix(attention)]
    return patches
