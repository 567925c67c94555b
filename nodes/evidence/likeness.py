"""How much like its reference a subject is, where it stands in a picture: by its face, or by its image encoder."""

from __future__ import annotations

from typing import Any

import comfy.model_management as mm
import torch
import torch.nn.functional as F
from torch import Tensor

from ...moa_core.subjects.reference import MEAN
from ...moa_core.subjects.subject import Subject
from ..experts.loaded_ip_adapter import LoadedFaceAdapter, LoadedIPAdapter
from ..experts.loaded_moa import LoadedMoA
from ..experts.loaded_photomaker import LoadedPhotoMaker
from ..experts.lora_file import LoRAs

BY_FACE, BY_IMAGE = "face embedding", "image features"
"""What is compared, for the report."""

FRAMINGS = (1.0, 1.5, 2.0)
"""How far down a picture is cut, in heights of the place: routers see heads, references show busts as well."""


Encoder = LoadedMoA | LoadedIPAdapter | LoadedPhotoMaker


def encoder_of(subject: Subject, moa: LoadedMoA | None) -> Encoder | None:
    """What can encode pictures as the subject's reference was; None for a LoRA, which was made of no picture."""
    if subject.adapter is None:
        return moa
    return None if isinstance(subject.adapter, LoRAs) else subject.adapter


def compared(subject: Subject, encoder: Encoder | None) -> str | None:
    """What of the subject is compared; None: nothing can be."""
    if encoder is None:
        return None
    known = subject.face is not None and isinstance(encoder, LoadedFaceAdapter)
    return BY_FACE if known else BY_IMAGE


def likeness(
    subject: Subject, encoder: Encoder, images: Tensor, places: Tensor, numbers: list[int]
) -> list[float | None]:
    """The cosine between the reference and what is in the subject's place, for every picture; of several photos their
    mean.

    images [B, H, W, 3]; places [B, H, W], 1 where the subject is; numbers: of the pictures in the whole batch. None for
    a picture that the subject is not found in, or no face where the encoder knows people by the face.
    """
    by_face = compared(subject, encoder) == BY_FACE
    alike: list[float | None] = [None] * len(images)
    for n, (picture, place, number) in enumerate(zip(images, places, numbers, strict=True)):
        mm.throw_exception_if_processing_interrupted()
        if bool(place.any()):
            alike[n] = (_by_face if by_face else _by_features)(subject, encoder, picture, place, number)
    return alike


def _by_face(subject: Subject, encoder: LoadedFaceAdapter, picture: Tensor, place: Tensor, number: int) -> float | None:
    """Between the faces of the photos and the largest one whose middle is in the subject's place."""
    found = encoder.prepare(picture, place)
    return None if found is None else float(subject.face[number % subject.variants].cpu() @ found.normalized)


def _by_features(subject: Subject, encoder: Encoder, picture: Tensor, place: Tensor, number: int) -> float | None:
    """Between features. How the reference was cut is not known any more: the most alike of several framings counts."""
    framed = [_prepared(encoder, picture, place, framing) for framing in FRAMINGS]
    framed = [each for each in framed if each is not None]
    if not framed:
        return None
    own = subject.feature(number).float().cpu().view(-1, 1, encoder.feature_dim)  # [photos, 1, F]
    return float(torch.cosine_similarity(own, encoder.encode(framed), dim=-1).mean(dim=0).max())


def _prepared(encoder: Encoder, picture: Tensor, place: Tensor, framing: float) -> Any:
    """The place in a picture as the encoder is shown it: a MoA's alone does not see what is behind a person."""
    mean = picture.new_tensor(MEAN)
    if isinstance(encoder, LoadedMoA):
        picture = torch.lerp(mean, picture, place[..., None])
    rows, columns = place.any(dim=1).nonzero().flatten(), place.any(dim=0).nonzero().flatten()
    top, height = int(rows[0]), int(rows[-1]) + 1 - int(rows[0])
    bottom = top + round(framing * height)
    below = max(0, bottom - len(picture))
    picture = torch.cat([picture, mean.expand(below, picture.shape[1], 3)])
    frame = F.pad(torch.zeros_like(place), (0, 0, 0, below))
    frame[top:bottom, int(columns[0]) : int(columns[-1]) + 1] = 1.0
    return encoder.prepare(picture, frame)
