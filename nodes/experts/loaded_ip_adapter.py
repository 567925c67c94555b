"""An IP-Adapter as the MOA of a graph: what encodes photos, and the image experts that read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import comfy.clip_vision
import comfy.model_management as mm
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...moa_core.adapters.image_tokens import GRID
from ...moa_core.adapters.ip_adapter_file import IPAdapter, vision_model
from ...moa_core.address import Address, BlockShape
from ...moa_core.files.fingerprint import fingerprint
from ...moa_core.routing.trace import TIMESTEPS
from ...moa_core.subjects.reference import MARGIN, MEAN, check_size, show_reference, square_crop
from ...moa_core.subjects.subject import EncoderId
from ..photos.faces import Face, find_face


@dataclass(eq=False)
class LoadedIPAdapter:
    """What LoadedMoA is, of an IP-Adapter."""

    name: str
    adapter: IPAdapter
    clip_vision: comfy.clip_vision.ClipVisionModel | None
    """None: the file reads none."""
    mixture: ModelPatcher
    """The image experts: wanted beside the U-Net."""

    timesteps = TIMESTEPS
    sees_middle = True
    """Whether of a photo without a mask the middle square alone is encoded."""

    @property
    def base(self) -> str:
        return self.adapter.family

    @property
    def feature_dim(self) -> int:
        return self.adapter.mixture.feature_dim

    @property
    def shapes(self) -> list[BlockShape]:
        return self.adapter.mixture.shapes

    @cached_property
    def encoder(self) -> EncoderId:
        projector, settings = self.adapter.projector, self._settings()
        seeing = [] if self.clip_vision is None else [self.clip_vision.model]
        return EncoderId(fingerprint(settings, projector, *seeing), self.name)

    def _settings(self) -> dict[str, Any]:
        """What decides, besides weights, what features are made of a photo."""
        own = {"projector": type(self.adapter.projector).__name__, "margin": MARGIN, "around": MEAN}
        return {**self._statistics(), **own}

    def _statistics(self) -> dict[str, Any]:
        """How CLIP wants its pixels."""
        vision = self.clip_vision
        return {"size": vision.image_size, "mean": vision.image_mean, "std": vision.image_std}

    def fits(self, blocks: Mapping[Address, BlockShape]) -> bool:
        return self.adapter.mixture.fits(blocks)

    def reads(self, width: int) -> bool:
        """Whether features so wide are for this one."""
        return width == self.feature_dim

    def prepare(self, picture: Tensor, mask: Tensor | None) -> Tensor:
        """A picture [H, W, 3] as CLIP crops it, or a square round the person where there is a mask -> [3, s, s]."""
        check_size(picture)
        shown = picture if mask is None else square_crop(picture, mask)
        return comfy.clip_vision.clip_preprocess(shown[None].float(), **self._statistics())[0]

    def show(self, prepared: Tensor) -> Tensor:
        """What is seen of a photo, as a picture [s, s, 3]."""
        return show_reference(prepared)

    def encode(self, prepared: Sequence[Tensor]) -> Tensor:
        """P prepared pictures [3, s, s] -> features [P, F]: the image tokens of each in one row."""
        return self.adapter.projector(self._seen(torch.stack(prepared))).flatten(1)

    def together(self, features: Tensor) -> Tensor:
        """Of photos of one person, [P, F] -> [1, F]: their mean."""
        return features.mean(dim=0, keepdim=True)

    def encode_nobody(self) -> None:
        """Give rows without a picture the tokens of nothing, as in the IP-Adapter's training.

        Raises ValueError where the CLIP vision model is not the one that the file was trained with.
        """
        self.adapter.mixture.negative = self.adapter.projector(self._nothing())[0]

    def _nothing(self) -> Tensor:
        """What the projector reads of CLIP where there is no picture."""
        projector, size = self.adapter.projector, self.clip_vision.image_size
        nothing = self._seen(torch.zeros(1, 3, size, size))
        found = nothing.shape[-1]
        if found != projector.width or (projector.reads == GRID and nothing.shape[1:] != (257, projector.width)):
            raise ValueError(
                f"MoA From IP-Adapter: '{self.name}' reads a CLIP vision model {vision_model(projector)}, this "
                f"CLIP_VISION gives {found}. Load the other model in Load CLIP Vision: the page of the IP-Adapter "
                "names it"
            )
        return nothing if projector.reads == GRID else torch.zeros_like(nothing)

    def _seen(self, prepared: Tensor) -> Tensor:
        """What the projector reads of prepared pictures [P, 3, s, s]: [P, width] or [P, 257, width]."""
        vision = self.clip_vision
        mm.load_models_gpu([vision.patcher])
        _, before_last, pooled, *_ = vision.model(pixel_values=prepared.to(vision.load_device), intermediate_output=-2)
        return (before_last if self.adapter.projector.reads == GRID else pooled).float().cpu()


@dataclass(eq=False)
class LoadedFaceAdapter(LoadedIPAdapter):
    """The same of a FaceID file: it sees a photo's face, by insightface's embedding, and maybe by CLIP as well."""

    analysis: Any
    """insightface's FaceAnalysis, or what has its `get`."""

    sees_middle = False

    def reads(self, width: int) -> bool:
        return width % self.feature_dim == 0

    def _settings(self) -> dict[str, Any]:
        projector = self.adapter.projector
        seen = {} if self.clip_vision is None else self._statistics()
        own = {"projector": type(projector).__name__, "v2": getattr(projector, "is_v2", False)}
        return {**seen, **own, "face": projector.face, "models": self.adapter.faces}

    def prepare(self, picture: Tensor, mask: Tensor | None) -> Face | None:
        """The largest face of a picture [H, W, 3], within the mask where there is one; None: there is no face."""
        check_size(picture)
        return find_face(self.analysis, picture, mask, self.adapter.projector.face)

    def show(self, prepared: Face) -> Tensor:
        return prepared.crop

    def encode(self, prepared: Sequence[Face]) -> Tensor:
        """Faces of P photos -> features [P, F]: the image tokens of each in one row."""
        embeddings = torch.stack([face.embedding for face in prepared])
        if self.clip_vision is None:
            return self.adapter.projector(embeddings).flatten(1)
        crops = torch.stack([face.crop for face in prepared])
        seen = self._seen(comfy.clip_vision.clip_preprocess(crops, **self._statistics()))
        return self.adapter.projector(embeddings, seen).flatten(1)

    def together(self, features: Tensor) -> Tensor:
        """Of photos of one person, [P, F] -> [1, P * F]: their tokens stand one after the other."""
        return features.flatten()[None]

    def encode_nobody(self) -> None:
        """The same; the embedding of nobody is zeros."""
        projector = self.adapter.projector
        nobody = torch.zeros(1, projector.face_width)
        nothing = () if self.clip_vision is None else (self._nothing(),)
        self.adapter.mixture.negative = projector(nobody, *nothing)[0]
