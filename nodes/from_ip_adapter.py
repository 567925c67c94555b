"""MoA From IP-Adapter: an IP-Adapter file and its CLIP vision model -> MOA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import comfy.clip_vision
import comfy.model_management as mm
import comfy.ops
import folder_paths
import torch
from comfy.model_patcher import CoreModelPatcher, ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..moa_core.adapters.image_tokens import GRID
from ..moa_core.adapters.ip_adapter_file import IPAdapter, load_ip_adapter, vision_model
from ..moa_core.address import Address, BlockShape
from ..moa_core.files.fingerprint import fingerprint
from ..moa_core.routing.trace import TIMESTEPS
from ..moa_core.subjects.reference import MARGIN, MEAN, check_size, square_crop
from ..moa_core.subjects.subject import EncoderId
from .sockets import CATEGORY, MOA, SEARCHED


@dataclass(eq=False)
class LoadedIPAdapter:
    """What LoadedMoA is, of an IP-Adapter."""

    name: str
    adapter: IPAdapter
    clip_vision: comfy.clip_vision.ClipVisionModel
    mixture: ModelPatcher
    """The image experts: wanted beside the U-Net."""

    timesteps = TIMESTEPS

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
        vision, projector = self.clip_vision, self.adapter.projector
        statistics = {"size": vision.image_size, "mean": vision.image_mean, "std": vision.image_std}
        settings = {**statistics, "projector": type(projector).__name__, "margin": MARGIN, "around": MEAN}
        return EncoderId(fingerprint(settings, projector, vision.model), self.name)

    def fits(self, blocks: Mapping[Address, BlockShape]) -> bool:
        return self.adapter.mixture.fits(blocks)

    def prepare(self, picture: Tensor, mask: Tensor | None) -> Tensor:
        """A picture [H, W, 3] as CLIP crops it, or a square round the person where there is a mask -> [3, s, s]."""
        check_size(picture)
        vision = self.clip_vision
        shown = picture if mask is None else square_crop(picture, mask)
        statistics = {"mean": vision.image_mean, "std": vision.image_std}
        return comfy.clip_vision.clip_preprocess(shown[None].float(), vision.image_size, **statistics)[0]

    def encode(self, prepared: Tensor) -> Tensor:
        """Prepared pictures [P, 3, s, s] -> features [P, F]: the image tokens of each in one row."""
        return self.adapter.projector(self._seen(prepared)).flatten(1)

    def encode_nobody(self) -> None:
        """Give rows without a picture the tokens of nothing, as in the IP-Adapter's training.

        Raises ValueError where the CLIP vision model is not the one that the file was trained with.
        """
        projector, size = self.adapter.projector, self.clip_vision.image_size
        nothing = self._seen(torch.zeros(1, 3, size, size))
        found = nothing.shape[-1]
        if found != projector.width or (projector.reads == GRID and nothing.shape[1:] != (257, projector.width)):
            raise ValueError(
                f"MoA From IP-Adapter: '{self.name}' reads a CLIP vision model {vision_model(projector)}, this "
                f"CLIP_VISION gives {found}. Load the other model in Load CLIP Vision: the page of the IP-Adapter "
                "names it"
            )
        negative = nothing if projector.reads == GRID else torch.zeros_like(nothing)
        self.adapter.mixture.negative = projector(negative)[0]

    def _seen(self, prepared: Tensor) -> Tensor:
        """What the projector reads of prepared pictures [P, 3, s, s]: [P, width] or [P, 257, width]."""
        vision = self.clip_vision
        mm.load_models_gpu([vision.patcher])
        _, before_last, pooled, *_ = vision.model(pixel_values=prepared.to(vision.load_device), intermediate_output=-2)
        return (before_last if self.adapter.projector.reads == GRID else pooled).float().cpu()


class MoAFromIPAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoAFromIPAdapter",
            display_name="MoA From IP-Adapter",
            category=CATEGORY,
            description=(
                "Uses an IP-Adapter for SD 1.5 or SDXL as a MoA: each person's photo acts where the checkpoint draws "
                "that person's word, and nowhere else. No masks to draw; several people, each their own."
            ),
            search_aliases=["ipadapter", "photo", *SEARCHED],
            inputs=[
                io.Combo.Input(
                    "ipadapter_name",
                    options=folder_paths.get_filename_list("ipadapter"),
                    tooltip="A .safetensors file in models/ipadapter, for the family of your checkpoint. SD 1.5: "
                    "ip-adapter_sd15, -plus_sd15, -plus-face_sd15, -full-face_sd15. SDXL: ip-adapter_sdxl, "
                    "ip-adapter_sdxl_vit-h, -plus_sdxl_vit-h, -plus-face_sdxl_vit-h.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    tooltip="From Load CLIP Vision: the model the IP-Adapter was made with. ViT-H; for ip-adapter_sdxl "
                    "alone ViT-bigG.",
                ),
            ],
            outputs=[MOA.Output(tooltip="For Subject Encoder and MoA Patch Model.")],
            is_experimental=True,
        )

    @classmethod
    def execute(cls, ipadapter_name: str, clip_vision: comfy.clip_vision.ClipVisionModel) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise("ipadapter", ipadapter_name)
        device = mm.get_torch_device()
        adapter = load_ip_adapter(path, comfy.ops.manual_cast, mm.unet_dtype(device))
        mixture = CoreModelPatcher(adapter.mixture, load_device=device, offload_device=mm.unet_offload_device())
        loaded = LoadedIPAdapter(ipadapter_name, adapter, clip_vision, mixture)
        loaded.encode_nobody()
        return io.NodeOutput(loaded)
