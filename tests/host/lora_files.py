"""LoRA files with random weights, of every kind that the host reads, for any MODEL and CLIP."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

RANK = 4
Random = Callable[..., Tensor]


def lora(shape: torch.Size, r: Random, rank: int = RANK) -> dict[str, Tensor]:
    ends = [1] * (len(shape) - 2)
    return {
        "lora_up.weight": r(shape[0], rank, *ends),
        "lora_down.weight": r(rank, *shape[1:]),
        "alpha": torch.tensor(3.0),
    }


def locon_with_a_middle(shape: torch.Size, r: Random) -> dict[str, Tensor]:
    if len(shape) < 4:
        return lora(shape, r)
    outer = {"lora_up.weight": r(shape[0], RANK, 1, 1), "lora_down.weight": r(RANK, shape[1], 1, 1)}
    return outer | {"lora_mid.weight": r(RANK, RANK, *shape[2:])}


def dora(shape: torch.Size, r: Random) -> dict[str, Tensor]:
    return lora(shape, r) | {"dora_scale": 1.0 + r(shape[0], *[1] * (len(shape) - 1)).abs()}


def loha(shape: torch.Size, r: Random) -> dict[str, Tensor]:
    inner = shape[1:].numel()
    return {
        f"hada_w{n}_{side}": r(*size) for n in (1, 2) for side, size in (("a", (shape[0], RANK)), ("b", (RANK, inner)))
    }


def lokr(shape: torch.Size, r: Random) -> dict[str, Tensor]:
    return {"lokr_w1": r(2, 2), "lokr_w2": r(shape[0] // 2, shape[1] // 2, *shape[2:])}


def glora(shape: torch.Size, r: Random) -> dict[str, Tensor]:
    if len(shape) > 2:
        return lora(shape, r)
    (out, inner) = shape
    sizes = {"a1": (RANK, inner), "a2": (inner, RANK), "b1": (RANK, inner), "b2": (out, RANK)}
    return {f"{name}.weight": r(*size) for name, size in sizes.items()}


def oft(shape: torch.Size, r: Random) -> dict[str, Tensor]:
    return {"oft_blocks": r(4, shape[0] // 4, shape[0] // 4), "alpha": torch.tensor(0.0)}


def boft(shape: torch.Size, r: Random) -> dict[str, Tensor]:
    return {"oft_blocks": r(2, shape[0] // 4, 4, 4), "alpha": torch.tensor(0.0)}


def difference(shape: torch.Size, r: Random) -> dict[str, Tensor]:
    return {"diff": 0.1 * r(*shape), "diff_b": r(shape[0])}


KINDS = {kind.__name__: kind for kind in (lora, locon_with_a_middle, dora, loha, lokr, glora, oft, boft, difference)}


def random_lora(
    model, clip=None, seed: int = 0, kind: str = "lora", scale: float = 0.1, only: str = "", rank: int = RANK
) -> dict[str, Tensor]:
    """Of every Linear and convolution of the U-Net that has a place in the picture, and of the text encoder.

    only: a pattern in the names of the weights that are changed; rank: of the kind `lora`.
    """
    import comfy.lora

    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> Tensor:
        return scale * torch.randn(*size, generator=generator)

    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    there = dict(model.model.named_parameters())
    made = partial(lora, rank=rank) if kind == "lora" else KINDS[kind]
    weights = {}
    for name, key in sorted(keys.items()):
        known = name.startswith("lora_unet_") and key in there and there[key].ndim > 1 and re.search(only, key)
        if known and not any(part in key for part in ("time_embed", "label_emb", "emb_layers")):
            own = made(there[key].shape, random)
            if f"{key.removesuffix('.weight')}.bias" not in there:
                own.pop("diff_b", None)
            weights |= {f"{name}.{part}": weight for part, weight in own.items()}
    if clip is not None:
        there = dict(clip.cond_stage_model.named_parameters())
        for name, key in sorted(comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {}).items()):
            if name.startswith(("lora_te_", "lora_te1_", "lora_te2_")) and key in there and there[key].ndim == 2:
                weights |= {f"{name}.{part}": weight for part, weight in lora(there[key].shape, random).items()}
    return {name: weight.contiguous() for name, weight in weights.items()}
