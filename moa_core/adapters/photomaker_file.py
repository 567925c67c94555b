"""PhotoMaker files of version 1 as they are published: an encoder of photos, and a LoRA of the U-Net."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..address import BlockShape
from ..files.file_error import FileError
from .fused_token import IdEncoder

HEAD = 64
"""Channels of one attention head of CLIP's vision models."""
ADVICE = "get photomaker-v1.bin from TencentARC/PhotoMaker"
_TEXT_KEYS = re.compile(r"attn2\.(processor\.)?to_k(_lora\.|\.lora_|\.lora\.)(down|A|up|B)\.weight$")


class PhotoMakerFileError(FileError):
    """Why a PhotoMaker file is refused."""


@dataclass(eq=False)
class PhotoMaker:
    """What a PhotoMaker file holds."""

    encoder: IdEncoder
    lora: dict[str, Tensor]
    """By diffusers' names."""
    shapes: list[BlockShape]
    """Of the transformers that the LoRA changes, in no order."""


def photomaker_of(file: str, weights: Mapping[str, Tensor]) -> PhotoMaker:
    """What the weights `id_encoder.*` and `lora_weights.*` of a file of that name make; the encoder is in float32.

    Raises PhotoMakerFileError for a file that is damaged or of another kind.
    """
    encoder = {n.removeprefix("id_encoder."): w.float() for n, w in weights.items() if n.startswith("id_encoder.")}
    lora = {n.removeprefix("lora_weights."): w for n, w in weights.items() if n.startswith("lora_weights.")}
    if any(name.startswith("qformer_perceiver.") for name in encoder):
        raise PhotoMakerFileError(file, "is PhotoMaker of version 2, and version 1 is read", ADVICE)
    if not encoder or not lora:
        raise PhotoMakerFileError(
            file, "is no PhotoMaker file: expected weights named id_encoder.* and lora_weights.*", ADVICE
        )
    try:
        built, shapes = _encoder(encoder), _shapes(lora)
    except (KeyError, ValueError, RuntimeError) as error:
        raise PhotoMakerFileError(file, f"is damaged or of a new kind ({error})", ADVICE) from error
    return PhotoMaker(built, lora, shapes)


def _encoder(weights: dict[str, Tensor]) -> IdEncoder:
    vision = "vision_model."
    patches = weights[f"{vision}embeddings.patch_embedding.weight"]
    hidden, patch = patches.shape[0], patches.shape[-1]
    places = len(weights[f"{vision}embeddings.position_embedding.weight"]) - 1
    layers = [int(n.split(".")[3]) for n in weights if n.startswith(f"{vision}encoder.layers.")]
    shape = {
        "hidden_size": hidden,
        "intermediate_size": len(weights[f"{vision}encoder.layers.0.mlp.fc1.weight"]),
        "num_hidden_layers": 1 + max(layers),
        "num_attention_heads": hidden // HEAD,
        "image_size": round(places**0.5) * patch,
        "patch_size": patch,
    }
    built = IdEncoder(shape, tuple(len(weights[f"visual_projection{n}.weight"]) for n in ("", "_2")))
    own = (vision, "visual_projection.")
    named = {f"clip.{n}" if n.startswith(own) else n: w for n, w in weights.items() if not n.endswith("position_ids")}
    built.load_state_dict(named, strict=True)
    return built.eval().requires_grad_(False)


def _shapes(lora: Mapping[str, Tensor]) -> list[BlockShape]:
    """Of the transformers whose keys of the text the LoRA changes."""
    halves: dict[str, dict[str, Tensor]] = {}
    for name, weight in lora.items():
        if found := _TEXT_KEYS.search(name):
            halves.setdefault(name[: found.start()], {})["down" if found[3] in ("down", "A") else "up"] = weight
    if not halves:
        raise ValueError("its LoRA changes no attention to the text")
    return [BlockShape(half["up"].shape[0], half["down"].shape[1]) for half in halves.values()]
