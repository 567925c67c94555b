"""MoA Loader: a MoA file -> MOA."""

from __future__ import annotations

import comfy.model_management as mm
import comfy.ops
import folder_paths
import torch
from comfy.model_patcher import CoreModelPatcher, ModelPatcher
from comfy_api.latest import io

from ..moa_core.learned.joined_layer import joined
from ..moa_core.learned.moa_file import load_moa
from .experts.loaded_moa import LoadedMoA
from .host.sockets import CATEGORY, MOA, SEARCHED


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
        moa = load_moa(path, encoder_dtype=encoder_dtype)
        # As the host builds a prior whose weights need no cast; where they do, cast_to says so.
        layers = joined(moa.mixture, comfy.ops.disable_weight_init, dtype=mm.unet_dtype(unet_device))
        mixture = CoreModelPatcher(layers, load_device=unet_device, offload_device=mm.unet_offload_device())
        # Its layers are transformers' own, which the host cannot stream weight by weight: whole or not at all.
        encoder = ModelPatcher(
            moa.image_encoder, load_device=encoder_device, offload_device=mm.text_encoder_offload_device()
        )
        return io.NodeOutput(LoadedMoA(moa_name, moa.config, mixture, encoder))
