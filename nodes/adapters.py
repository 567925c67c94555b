"""What the subjects of a MODEL bring along, put beside it."""

from __future__ import annotations

from collections.abc import Sequence

import comfy.model_management as mm
import comfy.sd
from comfy.model_patcher import CoreModelPatcher, ModelPatcher

from ..moa_core.adapters.run import Adapters
from ..moa_core.subjects.subject import Subject
from .from_ip_adapter import LoadedIPAdapter
from .lora_deltas import build_deltas
from .lora_file import LoRAs
from .messages import Message


def adapters_of(
    model: ModelPatcher, clip: comfy.sd.CLIP | None, subjects: Sequence[Subject]
) -> tuple[Adapters | None, list[ModelPatcher], list[Message]]:
    """The adapters of those subjects that have one, what holds their weights, and what is to be said of them.

    Raises ValueError for a LoRA that is for another family.
    """
    images = {subject: subject.adapter for subject in subjects if isinstance(subject.adapter, LoadedIPAdapter)}
    changed = [subject for subject in subjects if isinstance(subject.adapter, LoRAs)]
    files = [file for subject in changed for file in subject.adapter.files]
    beside = [loaded.mixture.clone() for loaded in dict.fromkeys(images.values())]
    if not images and not files:
        return None, [], []
    deltas, messages, parts = None, [], {}
    if files:
        deltas, messages = build_deltas(model, clip, files)
        beside.append(_patcher(deltas))
        first = 0
        for subject in changed:
            parts[subject] = list(range(first, first + len(subject.adapter.files)))
            first += len(subject.adapter.files)
    mixtures = {subject: loaded.adapter.mixture for subject, loaded in images.items()}
    return Adapters(mixtures, parts, deltas), beside, messages


def _patcher(module) -> ModelPatcher:
    return CoreModelPatcher(module, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device())
