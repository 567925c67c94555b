"""A PhotoMaker as the MOA of a graph: what encodes photos, and the LoRA that goes with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import comfy.clip_vision
import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...moa_core.adapters.ip_adapter_file import SDXL
from ...moa_core.address import Address, BlockShape
from ...moa_core.files.fingerprint import fingerprint
from ...moa_core.subjects.reference import MARGIN, MEAN, STD, check_size, show_reference, square_crop
from ...moa_core.subjects.subject import EncoderId
from .lora_file import LoRAFile


@dataclass(eq=False)
class LoadedPhotoMaker:
    """What LoadedMoA is, of a PhotoMaker. A subject's feature is its photos' identities [P, D] in one row."""

    name: str
    image_encoder: ModelPatcher
    """Encodes photos, and fuses what it makes of them with the word's tokens."""
    lora: LoRAFile
    shapes: list[BlockShape]
    base = SDXL
    sees_middle = True

    @property
    def feature_dim(self) -> int:
        return self.image_encoder.model.width

    @cached_property
    def encoder(self) -> EncoderId:
        settings = {"model": "PhotoMaker", "margin": MARGIN, "mean": MEAN, "std": STD}
        return EncoderId(fingerprint(settings, self.image_encoder.model), self.name)

    def fits(self, blocks: Mapping[Address, BlockShape]) -> bool:
        return sorted(map(_widths, self.shapes)) == sorted(map(_widths, blocks.values()))

    def reads(self, width: int) -> bool:
        return width % self.feature_dim == 0

    def prepare(self, picture: Tensor, mask: Tensor | None) -> Tensor:
        """A picture [H, W, 3] as CLIP crops it, or a square round the person where there is a mask -> [3, s, s]."""
        check_size(picture)
        shown = picture if mask is None else square_crop(picture, mask)
        size = self.image_encoder.model.size
        return comfy.clip_vision.clip_preprocess(shown[None].float(), size, mean=MEAN, std=STD)[0]

    def show(self, prepared: Tensor) -> Tensor:
        """What is seen of a photo, as a picture [s, s, 3]."""
        return show_reference(prepared)

    def encode(self, prepared: Sequence[Tensor]) -> Tensor:
        """P prepared pictures [3, s, s] -> identities [P, D] on the CPU."""
        mm.load_models_gpu([self.image_encoder])
        return self.image_encoder.model(torch.stack(prepared).to(self.image_encoder.load_device)).float().cpu()

    def together(self, features: Tensor) -> Tensor:
        """Of photos of one person, [P, D] -> [1, P * D]: the word stands once for each."""
        return features.flatten()[None]

    def fused(self, text: Tensor, places: Sequence[int], identities: Tensor, weight: float) -> Tensor:
        """A text [1, T, D] whose tokens at P places are fused with identities [P, D], as much as weight says."""
        mm.load_models_gpu([self.image_encoder])
        return self.image_encoder.model.fused(text, places, identities, weight)


def _widths(shape: BlockShape) -> tuple[int, int]:
    return shape.dim, shape.context_dim
