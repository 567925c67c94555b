"""The attention layers of the host's U-Net: which there are, what they compute, and ours beside them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial

import comfy.utils
import torch
from comfy.ldm.modules import attention as host_attention
from comfy.ldm.modules.attention import BasicTransformerBlock, CrossAttention
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...moa_core.address import ATTENTIONS, Address, BlockShape, Layer
from ...moa_core.attention import Attend, Prior, PriorAttention
from ...moa_core.run import Call

OVERRIDE = "optimized_attention_override"
UNET = "diffusion_model"


@contextmanager
def own_modules(model: ModelPatcher) -> Iterator[None]:
    """While it lasts, the checkpoint's U-Net has its own modules, whatever graph sampled last and put others there."""
    own = {name: module for name, module in model.object_patches_backup.items() if name.startswith(UNET)}
    others = {name: comfy.utils.set_attr(model.model, name, module) for name, module in own.items()}
    try:
        yield
    finally:
        for name, module in others.items():
            comfy.utils.set_attr(model.model, name, module)


def unet_blocks(model: ModelPatcher) -> dict[Address, BlockShape]:
    """Transformer blocks of the checkpoint's own U-Net; none for a model that is no U-Net."""
    blocks = {}
    with own_modules(model):
        for name, module in model.model.diffusion_model.named_modules():
            address = Address.from_ldm(name)
            if address and isinstance(module, BasicTransformerBlock) and module.attn2 is not None:
                blocks[address] = BlockShape(module.attn1.to_q.in_features, module.attn2.to_k.in_features)
    return blocks


def layer_of(model: ModelPatcher, name: str) -> torch.nn.Module | None:
    """The U-Net's layer of that name as this MODEL has it once it is loaded; None where others put something else."""
    path = f"{UNET}.{name}".split(".")
    for end in range(len(path), 0, -1):
        known = ".".join(path[:end])
        if known in model.object_patches or known in model.object_patches_backup:
            found = model.get_model_object(known)
            break
    else:
        found, end = model.model, 0
    for part in path[end:]:
        found = getattr(found, part, None)
    return found


def foreign_layers(model: ModelPatcher, blocks: Collection[Address]) -> frozenset[Layer]:
    """The attention layers in whose place others put a module of their own in this MODEL: they are not the prior's."""
    layers = [(address, attention) for address in blocks for attention in ATTENTIONS]
    return frozenset(
        (address, attention)
        for address, attention in layers
        if not isinstance(layer_of(model, f"{address.to_ldm()}.{attention}"), CrossAttention)
    )


def host_attend(transformer_options: dict) -> Attend:
    """The attention of the host's own layers, with whatever another node has put in its place."""

    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        return host_attention.optimized_attention(q, k, v, heads, transformer_options=transformer_options)

    return attend


def host_prior(unet: torch.nn.Module) -> Prior:
    """The U-Net's own cross-attention at an address; of one that others have replaced, which is not asked, the name."""

    @cache
    def at(address: Address) -> PriorAttention:
        name = f"{address.to_ldm()}.attn2"
        own = unet.get_submodule(name)
        parts = (getattr(own, part, None) for part in ("to_q", "to_k", "to_v", "to_out", "heads"))
        return PriorAttention(name, *parts)

    return at


def cast_to(dtype: torch.dtype, layers: torch.nn.Module) -> None:
    """Have layers of the host's classes cast their weights where they are not of that type."""
    for layer in layers.modules():
        if hasattr(layer, "comfy_cast_weights") and any(own.dtype != dtype for own in layer.parameters(recurse=False)):
            layer.comfy_cast_weights = True
            if hasattr(layer, "prev_comfy_cast_weights"):  # what it goes back to once the host has it all on the device
                layer.prev_comfy_cast_weights = True


def patched_options(options: dict, call: Call, foreign: Collection[Layer] = ()) -> dict:
    """transformer_options of one U-Net call with the call's work in its attention layers, but for the foreign ones.

    Of the attention patches ours are the first on the way in and the last on the way out; within cross-attention
    what another node has put in the attention's place is asked first.
    """
    options, patches = dict(options), dict(options.get("patches", {}))
    here = Here()
    for attention in call.attentions:
        before, after = f"{attention}_patch", f"{attention}_output_patch"
        patches[before] = [_hold(here, attention, foreign), *patches.get(before, [])]
        patches[after] = [*patches.get(after, []), _mix(here, call, attention)]
    options["patches"] = patches
    if call.in_attention:
        options[OVERRIDE] = _override(here, call, options.get(OVERRIDE))
    return options


@dataclass
class Here:
    """The attention layer that a U-Net call has come to."""

    attention: str = ""
    address: Address | None = None
    size: tuple[int, int] = (0, 0)
    """Its own: others may change it (Deep Shrink)."""
    h: Tensor | None = None
    """What enters it, [B, N, C], before anyone changes it; None: nothing of ours is to be done here."""


def _hold(here: Here, attention: str, foreign: Collection[Layer]):
    def before(h, context, value, extra_options):
        kind, number = extra_options["block"]
        here.attention, here.address = attention, Address(kind, number, extra_options["block_index"])
        here.size = tuple(extra_options["activations_shape"][-2:])
        here.h = None if (here.address, attention) in foreign else h
        return h, context, value

    return before


def _mix(here: Here, call: Call, attention: str):
    def after(prior, extra_options):
        h, here.h = here.h, None
        if h is None:
            return prior
        return call.mix(here.address, attention, h, prior, here.size)

    return after


def _override(here: Here, call: Call, others: Callable | None):
    """In the place of the host's attention function; others: what stood there already."""

    def attention(func, q, k, v, heads, *args, **kwargs):
        run = func if others is None else partial(others, func)
        seen = run(q, k, v, heads, *args, **kwargs)
        if here.attention != "attn2" or here.h is None or q.shape != here.h.shape or q.ndim != 3:
            return seen

        def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
            return run(q, k, v, heads, *args, **kwargs)

        here.attention = ""  # what others ask on the way is theirs
        return call.attended(here.address, q, k, seen, here.size, attend)

    return attention
