"""The U-Net call of a training."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from moa_core.address import Address
from moa_core.learned.unet_call import UNetCall


class WatchedCall(UNetCall):
    """A U-Net call that also keeps what the object loss reads: the expert's attention to the bound tokens."""

    attention: dict[Address, Tensor]
    """[K, N] of every block: how much each pixel attends to each of the K bound tokens."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.attention = {}
        if self.context.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            self.attend = plain_attention

    def mix(self, address: Address, attention: str, h: Tensor, prior: Tensor, size: tuple[int, int]) -> Tensor:
        layer = self.mixture.layer(address, attention)
        if layer is not None and attention == "attn2" and self.bound is not None:
            weights = layer.expert.attention_to(h, self.subject_prompt(address))  # [B, N, T]
            # Assigned, not appended: gradient checkpointing comes here a second time.
            self.attention[address] = weights[self.bound.rows, :, self.bound.positions]
        return super().mix(address, attention, h, prior, size)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """As moa_core.attention.attend, step by step: the fused one's backward in bfloat16 on a CPU costs twice as much."""
    q, k, v = (rearrange(x, "b n (heads d) -> b heads n d", heads=heads) for x in (q, k, v))
    weights = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1)  # [B, heads, K, T]
    return rearrange(weights.to(v) @ v, "b heads n d -> b n (heads d)")
