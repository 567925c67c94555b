"""Where an attention layer sits in a Stable Diffusion U-Net, and what each host calls that place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_LDM = re.compile(r"(?:^|\.)(input|middle|output)_block(?:s\.(\d+))?\.1\.transformer_blocks\.(\d+)(?:\.|$)")
_DIFFUSERS = re.compile(
    r"(?:^|\.)(down|mid|up)_block(?:s\.(\d+))?\.attentions\.(\d+)\.transformer_blocks\.(\d+)(?:\.|$)"
)
_KINDS = ("input", "middle", "output")


@dataclass(frozen=True, order=True)
class Address:
    """One transformer block of the U-Net in LDM order, written `input.1.0`: kind, block, transformer index."""

    kind: str
    block: int
    index: int

    def __str__(self) -> str:
        return f"{self.kind}.{self.block}.{self.index}"

    @property
    def order(self) -> tuple[int, int, int]:
        """Sorts addresses in the order in which a forward pass meets them."""
        return (_KINDS.index(self.kind), self.block, self.index)

    @classmethod
    def parse(cls, text: str) -> Address:
        kind, block, index = text.split(".")
        if kind not in _KINDS:
            raise ValueError(f"'{text}' is no layer address: expected input, middle or output, found '{kind}'")
        return cls(kind, int(block), int(index))

    @classmethod
    def from_ldm(cls, name: str) -> Address | None:
        """The address in an LDM module or weight name (`input_blocks.1.1.transformer_blocks.0...`), if any."""
        match = _LDM.search(name)
        return cls(match[1], int(match[2] or 0), int(match[3])) if match else None

    @classmethod
    def from_diffusers(cls, name: str, layers_per_block: int) -> Address | None:
        """The address in a diffusers name (`down_blocks.0.attentions.0.transformer_blocks.0...`), if any.

        LDM numbers every residual block and every downsampler of the encoder in one row, after the first
        convolution; the decoder has one residual block more per level and carries its upsampler along.
        """
        match = _DIFFUSERS.search(name)
        if not match:
            return None
        side, level, place, index = match[1], int(match[2] or 0), int(match[3]), int(match[4])
        if side == "down":
            return cls("input", 1 + level * (layers_per_block + 1) + place, index)
        if side == "mid":
            return cls("middle", 0, index)
        return cls("output", level * (layers_per_block + 1) + place, index)

    def to_ldm(self) -> str:
        """The LDM module name of the transformer block."""
        place = "middle_block" if self.kind == "middle" else f"{self.kind}_blocks.{self.block}"
        return f"{place}.1.transformer_blocks.{self.index}"

    def to_diffusers(self, layers_per_block: int) -> str:
        """The diffusers module name of the transformer block."""
        if self.kind == "middle":
            return f"mid_block.attentions.0.transformer_blocks.{self.index}"
        first = 1 if self.kind == "input" else 0
        level, place = divmod(self.block - first, layers_per_block + 1)
        side = "down" if self.kind == "input" else "up"
        return f"{side}_blocks.{level}.attentions.{place}.transformer_blocks.{self.index}"


ATTENTIONS = ("attn1", "attn2")
"""The two attention layers of a transformer block: self-attention and cross-attention."""

Layer = tuple[Address, str]
"""An attention layer: its block, and which of the block's two it is."""


@dataclass(frozen=True)
class BlockShape:
    """Widths of one transformer block: hidden channels, and channels of the text embedding it attends to."""

    dim: int
    context_dim: int


def attention_weights(state_dict: Mapping[str, Any]) -> dict[Address, dict[str, Any]]:
    """Attention weights of an SD U-Net, by address, then by short name (`attn1.to_q.weight`).

    Accepts LDM names (with or without the checkpoint's prefix) and diffusers names. Addresses come in
    the order of the forward pass.
    """
    found: dict[Address, dict[str, Any]] = {}
    layers_per_block = _layers_per_block(state_dict)
    for name, weight in state_dict.items():
        short = re.search(r"\.(attn[12]\.to_(?:q|k|v|out\.0)\.(?:weight|bias))$", name)
        address = Address.from_ldm(name) or Address.from_diffusers(name, layers_per_block)
        if short and address:
            found.setdefault(address, {})[short[1]] = weight
    return {a: found[a] for a in sorted(found, key=lambda a: a.order)}


def block_shapes(state_dict: Mapping[str, Any]) -> dict[Address, BlockShape]:
    """Widths of every transformer block of an SD U-Net, read off its weights' shapes."""
    return {
        address: BlockShape(weights["attn1.to_q.weight"].shape[1], weights["attn2.to_k.weight"].shape[1])
        for address, weights in attention_weights(state_dict).items()
    }


def _layers_per_block(state_dict: Mapping[str, Any]) -> int:
    """Residual blocks per level, counted in diffusers names (0 where there are none)."""
    places = [re.search(r"(?:^|\.)down_blocks\.0\.resnets\.(\d+)\.", name) for name in state_dict]
    return max((int(match[1]) + 1 for match in places if match), default=0)
