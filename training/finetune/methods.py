"""MoA and what it is compared with, trained by the same loop on the same records: `model.method`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from moa_core.adapters.image_expert import ImageExpert, ImageMixture, file_order
from moa_core.adapters.image_tokens import PooledTokens
from moa_core.adapters.ip_adapter_file import IPAdapter, save_ip_adapter
from moa_core.address import ATTENTIONS, Address
from moa_core.attention import attend
from moa_core.learned.expert import Expert
from moa_core.learned.moa import MoA
from moa_core.learned.moa_file import save_moa
from moa_core.learned.moa_layer import MoALayer
from moa_core.learned.unet_call import UNetCall
from training.finetune.watched_call import WatchedCall

SATURATED = 60.0
"""A router's bias that leaves nothing to the other side: softmax over (-60, 60) is (0, 1) in float32."""
TEXT_ALONE = 800
"""FastComposer samples this timestep and those above, the first 10 of 50 steps, with the text alone."""


@dataclass(frozen=True)
class Method:
    """What there is to know of a method beside its configuration."""

    prepare: Callable[[MoA], object]
    """Turns a fresh MoA into the method and freezes what does not belong to it."""
    training_call: type[UNetCall] = WatchedCall
    sampling_call: type[UNetCall] = UNetCall
    save: Callable[[MoA, Path], None] | None = save_moa
    """Writes what it has learnt as a file that the nodes load; None: there is no such file."""


def _without_spacetime(moa: MoA) -> None:
    """The subject prompt without PE(t, l) of eq. 8."""
    position = moa.mixture.subject_prompt.position
    nn.init.zeros_(position.weight)
    nn.init.zeros_(position.bias)
    position.requires_grad_(False)


def _finetune_in_place(*attentions: str) -> Callable[[MoA], None]:
    """No MoA layer: these attentions are the expert's everywhere, the others the prior's."""

    def prepare(moa: MoA) -> None:
        for address, attention in moa.config.layers:
            layer = moa.mixture.layer(address, attention)
            side = SATURATED if attention in attentions else -SATURATED
            layer.router.choice.bias.data = torch.tensor([-side, side])
            layer.router.requires_grad_(False)
            layer.expert.requires_grad_(attention in attentions)

    return prepare


def _fastcomposer(moa: MoA) -> None:
    """What FastComposer (Xiao et al., 2023) trains of the attentions, and a subject prompt without PE(t, l).

    It also trains all else of the U-Net (convolutions, feed-forward layers), which stays the prior's here, and fuses
    word and picture by two MLPs and a LayerNorm of its own.
    """
    _finetune_in_place(*ATTENTIONS)(moa)
    _without_spacetime(moa)


class LateCall(UNetCall):
    """Binds the subjects once the text alone has laid out the picture: FastComposer's delayed conditioning."""

    def __init__(self, mixture: nn.Module, context: Tensor, timestep: Tensor, bound: Any = None, *options: Any):
        late = float(timestep[0]) < TEXT_ALONE
        super().__init__(mixture, context, timestep, bound if late else None, *options)


def _decouple(moa: MoA) -> None:
    """IP-Adapter (Ye et al., 2023): keys and values for image tokens, started as the prior's; all else frozen."""
    for address, attention in moa.config.layers:
        layer: MoALayer = moa.mixture.layer(address, attention).requires_grad_(False)
        if attention == "attn2":
            layer.expert = Decoupled(layer.expert)
    moa.mixture.subject_prompt = PooledTokens(moa.config.feature_dim, moa.config.text_dim)


class Decoupled(nn.Module):
    """An image expert with the projections it shares with the prior: frozen copies of those."""

    def __init__(self, prior: Expert):
        """prior: a copy of the prior's attention."""
        super().__init__()
        self.image = ImageExpert(prior.to_k.out_features, prior.to_k.in_features)
        self.image.load_state_dict({f"to_{kind}.weight": getattr(prior, f"to_{kind}").weight for kind in "kv"})
        self.heads, self.to_q, self.to_out = prior.heads, prior.to_q, prior.to_out

    def forward(self, h: Tensor, tokens: Tensor, seen: Tensor) -> Tensor:
        """delta [B, N, C] of h [B, N, C] that attends to tokens [B, T, D], those seen [B, 1, T]."""
        seen_tokens = attend(self.to_q(h), *self.image.keys_values(tokens), self.heads, seen[:, None])
        return nn.functional.linear(seen_tokens, self.to_out[0].weight)


def _save_ip_adapter(moa: MoA, path: Path) -> None:
    save_ip_adapter(as_ip_adapter(moa), path)


def as_ip_adapter(moa: MoA) -> IPAdapter:
    """What `ip_adapter` has learnt, as MoA From IP-Adapter uses it: routed by words."""
    tokens: PooledTokens = moa.mixture.subject_prompt
    blocks = moa.config.blocks
    order = file_order(blocks)
    mixture = ImageMixture([blocks[address] for address in order], tokens.count)
    for layer, address in zip(mixture.layers, order, strict=True):
        layer.load_state_dict(moa.mixture.layer(address, "attn2").expert.image.state_dict())
    with torch.no_grad():
        mixture.negative = tokens(tokens.proj.weight.new_zeros(1, moa.config.feature_dim))[0]
    return IPAdapter(mixture, tokens)


class UnroutedImageCall(WatchedCall):
    """Adds attention to image tokens to the prior's cross-attention. No word is bound, and nothing is routed."""

    def __init__(self, mixture: nn.Module, context: Tensor, timestep: Tensor, bound: Any = None, *options: Any):
        super().__init__(mixture, context, timestep, None, *options)
        rows, width = len(context), mixture.config.feature_dim
        people = 1 if bound is None else int(bound.rows.bincount(minlength=rows).max())
        features = context.new_zeros(rows, people, width)  # a row without a picture: that of nothing
        present = torch.zeros(rows, people, dtype=torch.bool, device=context.device)
        present[:, 0] = True
        if bound is not None:
            where = bound.rows.to(context.device)
            earlier = where[:, None] == where[None, :]
            place = earlier.tril(-1).sum(dim=1)  # [K]: how many of the row came before
            features = features.index_put((where, place), bound.features.to(context))
            present[where, place] = True
        self.tokens = rearrange(mixture.subject_prompt(features), "b s n d -> b (s n) d")
        self.present = present.repeat_interleave(PooledTokens.count, dim=1)[:, None]  # [B, 1, S * n]

    def mix(self, address: Address, attention: str, h: Tensor, prior: Tensor, size: tuple[int, int]) -> Tensor:
        self.shares[address, attention] = h.new_zeros(len(h), *size)
        if attention == "attn1":
            return prior
        expert: Decoupled = self.mixture.layer(address, attention).expert
        return prior + self.strength * expert(h, self.tokens, self.present)


METHODS = {
    "moa": Method(lambda moa: None),
    "moa_without_spacetime": Method(_without_spacetime),
    "cross_attention": Method(_finetune_in_place("attn2")),
    "fastcomposer": Method(_fastcomposer, sampling_call=LateCall, save=None),
    "ip_adapter": Method(_decouple, UnroutedImageCall, UnroutedImageCall, _save_ip_adapter),
}
"""By the names of `model.method` (training/config.py)."""
