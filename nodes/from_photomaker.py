"""MoA From PhotoMaker: a PhotoMaker file -> MOA."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management as mm
import folder_paths
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..moa_core.adapters.photomaker_file import ADVICE, PhotoMakerFileError, photomaker_of
from .experts.loaded_photomaker import LoadedPhotoMaker
from .experts.lora_file import LoRAFile
from .host.pickled_file import read_parts
from .host.sockets import CATEGORY, MOA, SEARCHED


class MoAFromPhotoMaker(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoAFromPhotoMaker",
            display_name="MoA From PhotoMaker",
            category=CATEGORY,
            description=(
                "Uses PhotoMaker for SDXL as a MoA: each person's photos act through that person's word, and the LoRA "
                "in the file where the checkpoint draws that word, and nowhere else. The weights are under Apache-2.0."
            ),
            search_aliases=["photo maker", "photo", *SEARCHED],
            inputs=[
                io.Combo.Input(
                    "photomaker_name",
                    options=folder_paths.get_filename_list("photomaker"),
                    tooltip="photomaker-v1 in models/photomaker, as .bin or .safetensors, for SDXL checkpoints.",
                ),
            ],
            outputs=[MOA.Output(tooltip="For Subject Encoder and MoA Patch Model.")],
            is_experimental=True,
        )

    @classmethod
    def execute(cls, photomaker_name: str) -> io.NodeOutput:
        path = Path(folder_paths.get_full_path_or_raise("photomaker", photomaker_name))
        photomaker = photomaker_of(path.name, read_parts(path, PhotoMakerFileError, ADVICE))
        encoder = ModelPatcher(
            photomaker.encoder,
            load_device=mm.text_encoder_device(),
            offload_device=mm.text_encoder_offload_device(),
        )
        lora = LoRAFile(photomaker_name, photomaker.lora)
        return io.NodeOutput(LoadedPhotoMaker(photomaker_name, encoder, lora, photomaker.shapes))
