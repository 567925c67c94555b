"""MoA From IP-Adapter: an IP-Adapter file, its CLIP vision model or insightface -> MOA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.model_management as mm
import comfy.ops
import folder_paths
import torch
from comfy.model_patcher import CoreModelPatcher
from comfy_api.latest import io

from ..moa_core.adapters.ip_adapter_file import (
    IPAdapter,
    IPAdapterFileError,
    ip_adapter_of,
    load_ip_adapter,
    vision_model,
)
from .experts.loaded_ip_adapter import LoadedFaceAdapter, LoadedIPAdapter
from .host.folders import ip_adapter_files
from .host.pickled_file import read_parts
from .host.sockets import CATEGORY, INSIGHTFACE, MOA, SEARCHED
from .photos.faces import face_analysis

AGAIN = "download it again from h94/IP-Adapter or h94/IP-Adapter-FaceID, as .safetensors where there is one"


class MoAFromIPAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoAFromIPAdapter",
            display_name="MoA From IP-Adapter",
            category=CATEGORY,
            description=(
                "Uses an IP-Adapter for SD 1.5 or SDXL as a MoA: each person's photo acts where the checkpoint draws "
                "that person's word, and nowhere else. No masks to draw; several people, each their own. FaceID files "
                "are for research only, as insightface's models are."
            ),
            search_aliases=["ipadapter", "photo", "insightface", *SEARCHED],
            inputs=[
                io.Combo.Input(
                    "ipadapter_name",
                    options=ip_adapter_files(),
                    tooltip="A file in models/ipadapter, for the family of your checkpoint. SD 1.5: ip-adapter_sd15, "
                    "-plus_sd15, -plus-face_sd15, -full-face_sd15. SDXL: ip-adapter_sdxl, ip-adapter_sdxl_vit-h, "
                    "-plus_sdxl_vit-h, -plus-face_sdxl_vit-h. Both, by the face and for research only: "
                    "ip-adapter-faceid, -plus, -plusv2, -portrait.",
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,  # FaceID files read none, unless they are plus
                    tooltip="From Load CLIP Vision: the model the IP-Adapter was made with. ViT-H; for ip-adapter_sdxl "
                    "alone ViT-bigG. FaceID and FaceID portrait files need none.",
                ),
                INSIGHTFACE.Input(
                    "insightface",
                    optional=True,
                    tooltip="For FaceID files: from another pack's insightface loader (buffalo_l; for InstantID's "
                    "adapter antelopev2). Open: the insightface package, where it is installed.",
                ),
            ],
            outputs=[MOA.Output(tooltip="For Subject Encoder and MoA Patch Model.")],
            is_experimental=True,
        )

    @classmethod
    def execute(
        cls,
        ipadapter_name: str,
        clip_vision: comfy.clip_vision.ClipVisionModel | None = None,
        insightface: Any = None,
    ) -> io.NodeOutput:
        device = mm.get_torch_device()
        adapter = _read(ipadapter_name, mm.unet_dtype(device))
        if adapter.projector.reads is None:
            clip_vision = None
        elif clip_vision is None:
            raise ValueError(
                f"MoA From IP-Adapter: '{ipadapter_name}' reads a CLIP vision model {vision_model(adapter.projector)}, "
                "and none is connected. Connect Load CLIP Vision"
            )
        mixture = CoreModelPatcher(adapter.mixture, load_device=device, offload_device=mm.unet_offload_device())
        if adapter.faces:
            analysis = face_analysis(insightface, adapter.faces, ipadapter_name)
            loaded = LoadedFaceAdapter(ipadapter_name, adapter, clip_vision, mixture, analysis)
        else:
            loaded = LoadedIPAdapter(ipadapter_name, adapter, clip_vision, mixture)
        loaded.encode_nobody()
        return io.NodeOutput(loaded)


def _read(name: str, dtype: torch.dtype) -> IPAdapter:
    """Raises IPAdapterFileError, or the host's error for a file that is not there."""
    path = Path(folder_paths.get_full_path_or_raise("ipadapter", name))
    if path.suffix == ".safetensors":
        return load_ip_adapter(path, comfy.ops.manual_cast, dtype)
    weights = read_parts(path, IPAdapterFileError, AGAIN)
    return ip_adapter_of(path.name, weights, comfy.ops.manual_cast, dtype)
