"""A MoA file as the MOA of a graph: experts and routers, and what encodes photos."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...moa_core.address import Address, BlockShape
from ...moa_core.files.fingerprint import fingerprint
from ...moa_core.learned.moa import MoAConfig
from ...moa_core.subjects.reference import MARGIN, MEAN, STD, prepare_reference, show_reference
from ...moa_core.subjects.subject import EncoderId


@dataclass(eq=False)
class LoadedMoA:
    """A MoA whose two halves ComfyUI loads, offloads and counts on their own."""

    name: str
    config: MoAConfig
    mixture: ModelPatcher
    """Experts, routers and subject prompt: wanted beside the U-Net."""
    image_encoder: ModelPatcher
    """Wanted while subjects are encoded, no longer."""

    sees_middle = False

    @property
    def base(self) -> str:
        return self.config.base

    @property
    def feature_dim(self) -> int:
        return self.config.feature_dim

    @property
    def shapes(self) -> list[BlockShape]:
        return list(self.config.blocks.values())

    @property
    def timesteps(self) -> int:
        return self.config.timesteps

    @cached_property
    def encoder(self) -> EncoderId:
        settings = {"model": self.config.image_encoder, "margin": MARGIN, "mean": MEAN, "std": STD}
        return EncoderId(fingerprint(settings, self.image_encoder.model), self.name)

    def fits(self, blocks: Mapping[Address, BlockShape]) -> bool:
        return self.config.blocks == blocks

    def reads(self, width: int) -> bool:
        """Whether features so wide are for this one."""
        return width == self.feature_dim

    def prepare(self, picture: Tensor, mask: Tensor | None) -> Tensor:
        """A picture [H, W, 3] and the mask [H, W] of its person -> [3, size, size]."""
        return prepare_reference(picture, mask, self.image_encoder.model.size)

    def show(self, prepared: Tensor) -> Tensor:
        """What is seen of a picture, as a picture [size, size, 3]."""
        return show_reference(prepared)

    def encode(self, prepared: Sequence[Tensor]) -> Tensor:
        """P prepared pictures [3, size, size] -> features [P, F] on the CPU."""
        mm.load_models_gpu([self.image_encoder])
        encoder, device = self.image_encoder.model, self.image_encoder.load_device
        pixels = torch.stack(prepared).to(device, next(encoder.parameters()).dtype)
        return encoder(pixels).float().cpu()

    def together(self, features: Tensor) -> Tensor:
        """Of pictures of one person, [P, F] -> [1, F]: their mean."""
        return features.mean(dim=0, keepdim=True)
