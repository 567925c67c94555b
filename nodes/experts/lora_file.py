"""A LoRA file as the expert of a subject: read by the host, which knows every kind of it."""

from __future__ import annotations

from dataclasses import dataclass

import comfy.lora
import comfy.lora_convert
import comfy.sd
import comfy.utils
from comfy.model_patcher import ModelPatcher
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LoRAFile:
    """One file, and how a subject uses it."""

    name: str
    weights: dict[str, Tensor]
    trigger: str = ""
    """What its training called the person: stands in place of the word, for this file alone. Empty: the word."""
    strength: float = 1.0
    strength_clip: float = 1.0

    def model_patches(self, model: ModelPatcher, clip: comfy.sd.CLIP | None) -> dict:
        """The host's patches of the U-Net, by the names of its weights; the host logs what fits neither of both."""
        keys = comfy.lora.model_lora_keys_unet(model.model, {})
        if clip is not None:
            keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, keys)
        patches = comfy.lora.load_lora(self.weights, keys)
        there = model.model_state_dict("diffusion_model.")
        return {key: patch for key, patch in patches.items() if (key if isinstance(key, str) else key[0]) in there}

    def clip_patches(self, clip: comfy.sd.CLIP) -> dict:
        """The host's patches of the text encoder, by the names of its weights."""
        keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
        return comfy.lora.load_lora(self.weights, keys, log_missing=False)


@dataclass(frozen=True, eq=False)
class LoRAs:
    """The files of one subject; its features say how much of each: several are a morph's."""

    files: tuple[LoRAFile, ...]

    @property
    def name(self) -> str:
        return " - ".join(file.name for file in self.files)


def read_lora(path: str) -> dict[str, Tensor]:
    """The weights of a LoRA file, as Load LoRA reads it."""
    return comfy.lora_convert.convert_lora(comfy.utils.load_torch_file(path, safe_load=True))
