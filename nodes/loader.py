"""MoA Loader: a MoA file -> MOA."""

from dataclasses import dataclass

import comfy.model_management as mm
import comfy.ops
import folder_paths
import torch
from comfy.model_patcher import CoreModelPatcher, ModelPatcher
from comfy_api.latest import io

from ..moa_core.moa import MoA
from ..moa_core.moa_file import load_moa
from .sockets import CATEGORY, MOA, SEARCHED


@dataclass
class LoadedMoA:
    """A MoA whose two halves ComfyUI loads, offloads and counts on their own."""

    name: str
    moa: MoA
    mixture: ModelPatcher
    """Experts, routers and subject prompt: wanted beside the U-Net."""
    image_encoder: ModelPatcher
    """Wanted while subjects are encoded, no longer."""


class MoALoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoALoader",
            display_name="MoA Loader",
            category=CATEGORY,
            description="Loads a MoA: the experts, routers, subject prompts and image encoder, all from one file.",
            search_aliases=["load moa", *SEARCHED],
            inputs=[
                io.Combo.Input(
                    "moa_name",
                    options=folder_paths.get_filename_list("moa"),
                    tooltip="A moa-*.safetensors file in models/moa. It must be made for your checkpoint's family.",
                )
            ],
            outputs=[MOA.Output(tooltip="For Subject Encoder and MoA Patch Model.")],
        )

    @classmethod
    def execute(cls, moa_name: str) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise("moa", moa_name)
        unet_device, encoder_device = mm.get_torch_device(), mm.text_encoder_device()
        encoder_dtype = torch.float16 if mm.should_use_fp16(encoder_device) else torch.float32
        moa = load_moa(path, comfy.ops.manual_cast, mm.unet_dtype(unet_device), encoder_dtype)
        mixture = CoreModelPatcher(moa.mixture, load_device=unet_device, offload_device=mm.unet_offload_device())
        # Its layers are transformers' own, which the host cannot stream weight by weight: whole or not at all.
        encoder = ModelPatcher(
            moa.image_encoder, load_device=encoder_device, offload_device=mm.text_encoder_offload_device()
        )
        return io.NodeOutput(LoadedMoA(moa_name, moa, mixture, encoder))
