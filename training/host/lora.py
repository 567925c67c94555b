"""LoRA files in kohya's names, LoRAs in FaceID and PhotoMaker files: as changes of a diffusers U-Net's layers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import nn

from moa_core.adapters.deltas import LowRank
from moa_core.adapters.ip_adapter_file import IPAdapter
from moa_core.adapters.photomaker_file import PhotoMaker
from moa_core.address import block_shapes

UP, DOWN, ALPHA = ".lora_up.weight", ".lora_down.weight", ".alpha"
_MAKERS_DOWN = re.compile(r"unet\.(.+)\.processor\.(to_[a-z]+)_lora\.down\.weight$")
"""In a PhotoMaker file: the attention, and the layer in it."""


def in_file(name: str) -> str:
    """A layer's name in the file."""
    return f"lora_unet_{name.replace('.', '_')}"


def read_lora(unet: nn.Module, path: Path) -> dict[str, LowRank]:
    """What a file changes of a U-Net, by the names of its layers."""
    return dict(_read(unet, path))


def face_lora(unet: UNet2DConditionModel, adapter: IPAdapter) -> dict[str, LowRank]:
    """What the LoRA in a FaceID file changes of a U-Net, by the names of its layers."""
    blocks, per_block = block_shapes(unet.state_dict()), unet.config.layers_per_block
    return adapter.changes_of(blocks, lambda address: address.to_diffusers(per_block), torch.float32)


def maker_lora(maker: PhotoMaker) -> dict[str, LowRank]:
    """What the LoRA in a PhotoMaker file changes of SDXL's U-Net, by the names of its layers."""
    changes = {}
    for name, down in maker.lora.items():
        if found := _MAKERS_DOWN.match(name):
            layer = f"{found[1]}.{found[2].replace('to_out', 'to_out.0')}"
            changes[layer] = LowRank(maker.lora[name.replace(".down.", ".up.")].float(), down.float())
    return changes


def write_into(unet: nn.Module, changes: Mapping[str, LowRank]) -> None:
    """The ordinary way: the file's changes become the layers' own, in all of the picture."""
    for name, change in changes.items():
        layer = unet.get_submodule(name)
        layer.weight.data += (change.up @ change.down.flatten(1)).view_as(layer.weight)


def _read(unet: nn.Module, path: Path) -> Iterator[tuple[str, LowRank]]:
    stored = load_file(path)
    for name, _ in unet.named_modules():
        layer = in_file(name)
        if layer + UP in stored:
            up, down = stored[layer + UP].float(), stored[layer + DOWN].float()
            alpha = stored.get(layer + ALPHA)
            yield name, LowRank(up.flatten(1) * (1.0 if alpha is None else float(alpha) / len(down)), down)
