"""How much like its reference a subject is, where it stands in a picture, by the image encoder that made it."""

from __future__ import annotations

from typing import Any

import comfy.model_management as mm
import torch
import torch.nn.functional as F
from torch import Tensor

from ...moa_core.subjects.reference import MEAN
from ...moa_core.subjects.subject import Subject
from ..experts.loaded_ip_adapter import LoadedIPAdapter
from ..experts.loaded_moa import LoadedMoA
from ..experts.loaded_photomaker import LoadedPhotoMaker
from ..experts.lora_file import LoRAs

FRAMINGS = (1.0, 1.5, 2.0)
"""How far down a picture is cut, in heights of the place: routers see heads, references show busts as well."""


Encoder = LoadedMoA | LoadedIPAdapter | LoadedPhotoMaker


def encoder_of(subject: Subject, moa: LoadedMoA | None) -> Encoder | None:
    """What can encode pictures as the subject's reference was; None for a LoRA, which was made of no picture."""
    if subject.adapter is None:
        return moa
    return None if isinstance(subject.adapter, LoRAs) else subject.adapter


def likeness(
    subject: Subject, encoder: Encoder, images: Tensor, places: Tensor, numbers: list[int]
) -> list[float | None]:
    """The cosine between the features of the reference and of the subject's place, for every picture.

    images [B, H, W, 3]; places [B, H, W], 1 where the subject is; numbers: of the pictures in the whole batch. How the
    reference was cut is not known any more, so the most alike of several framings counts; of several photos their mean.
    None for a picture that the subject is not found in, or no face where the encoder knows people by the face.
    """
    alike: list[float | None] = [None] * len(images)
    for n, place in enumerate(places):
        mm.throw_exception_if_processing_interrupted()
        framed = [_prepared(encoder, images[n], place, framing) for framing in FRAMINGS] if bool(place.any()) else []
        framed = [each for each in framed if each is not None]
        if framed:
            own = subject.feature(numbers[n]).float().cpu().view(-1, 1, encoder.feature_dim)  # [photos, 1, F]
            alike[n] = float(torch.cosine_similarity(own, encoder.encode(framed), dim=-1).mean(dim=0).max())
    return alike


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
