"""A prompt as the LoRA of one subject reads it: the trigger in place of the word, encoded with the LoRA's changes."""

from __future__ import annotations

from collections.abc import Sequence

import comfy.sd
from torch import Tensor

from ..moa_core.subjects.binding import OwnText
from ..moa_core.subjects.subject import Subject
from .lora_file import LoRAFile, LoRAs
from .text_towers import ROOM, Tower

Places = dict[str, tuple[int, int]]
"""Of a word in a tokenized prompt: [from, to), counted through all chunks, by the name of the tower."""


def own_texts(
    clip: comfy.sd.CLIP, towers: Sequence[Tower], tokens: dict[str, list], places: dict[Subject, Places]
) -> list[tuple[OwnText, ...]]:
    """Of a tokenized prompt, for each LoRA subject in it; one list of them for each conditioning of its schedule."""
    found = [
        (subject, [_encoded(clip, towers, tokens, where, lora) for lora in subject.adapter.files])
        for subject, where in places.items()
        if isinstance(subject.adapter, LoRAs)
    ]
    count = max((len(texts) for _, files in found for texts in files if texts is not None), default=0)
    return [
        tuple(OwnText(subject, tuple(texts and texts[n] for texts in files)) for subject, files in found)
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


def with_trigger(tower: Tower, chunks: Sequence[list], place: tuple[int, int], trigger: Sequence[list]) -> list[list]:
    """Chunks of (token, weight) with the trigger's tokens in the place of a word's [from, to), counted through all.

    What no longer fits into a chunk goes into a new one after it.
    """
    made, offset = [], 0
    for chunk in chunks:
        seen = tower.seen(chunk)  # the indices of the tokens that the encoder reads
        if offset <= place[0] < offset + len(seen):
            first, last = seen[place[0] - offset], seen[place[1] - 1 - offset]
            weight = chunk[first][1]
            instead = [(token, own * weight) for part in trigger for token, own, *_ in tower.body(part)]
            body = [*tower.body(chunk[:first]), *instead, *tower.body([chunk[0], *chunk[last + 1 :]])]
            made += [tower.chunk(body[at : at + ROOM]) for at in range(0, max(len(body), 1), ROOM)]
        else:
            made.append(chunk)
        offset += len(seen)
    return made
