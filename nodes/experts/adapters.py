"""What the subjects of a MODEL bring along, put beside it."""

from __future__ import annotations

from collections.abc import Sequence

import comfy.model_management as mm
import comfy.sd
from comfy.model_patcher import CoreModelPatcher, ModelPatcher

from ...moa_core.adapters.run import Adapters
from ...moa_core.subjects.subject import Subject
from ..host.messages import Message
from .loaded_ip_adapter import LoadedIPAdapter
from .loaded_photomaker import LoadedPhotoMaker
from .lora_deltas import build_deltas
from .lora_file import LoRAs


def adapters_of(
    model: ModelPatcher, clip: comfy.sd.CLIP | None, subjects: Sequence[Subject]
) -> tuple[Adapters | None, list[ModelPatcher], list[Message]]:
    """The adapters of those subjects that have one, what holds their weights, and what is to be said of them.

    Raises ValueError for a LoRA that is for another family.
    """
    images = {subject: subject.adapter for subject in subjects if isinstance(subject.adapter, LoadedIPAdapter)}
    loras = {subject: subject.adapter.files for subject in subjects if isinstance(subject.adapter, LoRAs)}
    makers = {subject: subject.adapter for subject in subjects if isinstance(subject.adapter, LoadedPhotoMaker)}
    if not images and not loras and not makers:
        return None, [], []
    beside = [loaded.mixture.clone() for loaded in dict.fromkeys(images.values())]
    sources, parts = [], {}
    for subject, files in loras.items():
        parts[subject] = list(range(len(sources), len(sources) + len(files)))
        sources += files
    with_lora = {subject: loaded for subject, loaded in images.items() if loaded.adapter.changes} | makers
    for loaded in dict.fromkeys(with_lora.values()):  # one part for all who appear by it: it is the same for each
        parts |= {subject: [len(sources)] for subject, own in with_lora.items() if own is loaded}
        sources.append(loaded.lora if isinstance(loaded, LoadedPhotoMaker) else loaded)
    deltas, messages = None, []
    if sources:
        deltas, messages = build_deltas(model, clip, sources)
        beside.append(_patcher(deltas))
    mixtures = {subject: loaded.adapter.mixture for subject, loaded in images.items()}
    return Adapters(mixtures, parts, deltas, frozenset(makers)), beside, messages


def _patcher(module) -> ModelPatcher:
    return CoreModelPatcher(module, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device())
