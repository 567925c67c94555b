"""How much like its reference a subject is, where it stands in a picture, by the image encoder that made it."""

from __future__ import annotations

import comfy.model_management as mm
import torch
from torch import Tensor

from ..moa_core.subjects.subject import Subject
from .from_ip_adapter import LoadedIPAdapter
from .loader import LoadedMoA

PICTURES_AT_ONCE = 8


def encoder_of(subject: Subject, moa: LoadedMoA | None) -> LoadedMoA | LoadedIPAdapter | None:
    """What can encode pictures as the subject's reference was; None for a LoRA, which was made of no picture."""
    if subject.adapter is None:
        return moa
    return subject.adapter if isinstance(subject.adapter, LoadedIPAdapter) else None


def likeness(
    subject: Subject, encoder: LoadedMoA | LoadedIPAdapter, images: Tensor, places: Tensor
) -> list[float | None]:
    """The cosine between the features of the reference and of the subject's place, for every picture.

    images [B, H, W, 3]; places [B, H, W], 1 where the subject is. None for a picture that it is not found in.
    """
    found = [n for n, place in enumerate(places) if bool(place.any())]
    alike: list[float | None] = [None] * len(images)
    for start in range(0, len(found), PICTURES_AT_ONCE):
        mm.throw_exception_if_processing_interrupted()
        some = found[start : start + PICTURES_AT_ONCE]
        seen = encoder.encode(torch.stack([encoder.prepare(images[n], places[n]) for n in some]))  # [P, F]
        own = torch.stack([subject.feature(n) for n in some]).to(seen)
        for n, cosine in zip(some, torch.cosine_similarity(own, seen, dim=1).tolist(), strict=True):
            alike[n] = cosine
    return alike
