"""A prompt as the LoRA of one subject reads it: the trigger in place of the word, encoded with the LoRA's changes."""

from __future__ import annotations

from collections.abc import Sequence

import comfy.sd
from torch import Tensor

from ...moa_core.subjects.binding import OwnText
from ...moa_core.subjects.subject import Subject
from ..experts.loaded_photomaker import LoadedPhotoMaker
from ..experts.lora_file import LoRAFile, LoRAs
from .fused_text import fused_texts
from .text_towers import Tower
from .trigger import Places, with_trigger


def own_texts(
    clip: comfy.sd.CLIP, towers: Sequence[Tower], tokens: dict[str, list], places: dict[Subject, Places]
) -> list[tuple[OwnText, ...]]:
    """Of a tokenized prompt, for each subject in it that reads it in its own way; one list of them for each
    conditioning of its schedule."""
    found = []
    for subject, where in places.items():
        if isinstance(subject.adapter, LoRAs):
            found.append((subject, [_encoded(clip, towers, tokens, where, lora) for lora in subject.adapter.files]))
        elif isinstance(subject.adapter, LoadedPhotoMaker) and subject.weight:
            found.append((subject, fused_texts(clip, towers, tokens, where, subject)))
    count = max((len(texts) for _, files in found for texts in files if texts is not None), default=0)
    return [
        tuple(
            OwnText(subject, tuple(texts and texts[n] for texts in own), isinstance(subject.adapter, LoadedPhotoMaker))
            for subject, own in found
        )
        for n in range(count)
    ]


def _encoded(
    clip: comfy.sd.CLIP, towers: Sequence[Tower], tokens: dict[str, list], where: Places, lora: LoRAFile
) -> list[Tensor] | None:
    """The texts [1, T, D] of the schedule; None where the LoRA leaves the prompt as it is."""
    patches = lora.clip_patches(clip) if lora.strength_clip else {}
    if not patches and not lora.trigger:
        return None
    own = comfy.sd.CLIP.clone(clip)
    own.add_patches(patches, lora.strength_clip)
    if lora.trigger:
        trigger = comfy.sd.CLIP.tokenize(clip, lora.trigger)  # no prompt of anybody's
        tokens = tokens | {
            tower.name: with_trigger(tower, tokens[tower.name], where[tower.name], trigger[tower.name])
            for tower in towers
            if tower.name in where
        }
    return [text for text, _ in own.encode_from_tokens_scheduled(tokens, show_pbar=False)]
