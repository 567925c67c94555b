"""How much like its reference a subject is, where it stands in a picture, by the image encoder that made it."""

from __future__ import annotations

import comfy.model_management as mm
import torch
import torch.nn.functional as F
from torch import Tensor

from ..moa_core.subjects.reference import MEAN
from ..moa_core.subjects.subject import Subject
from .from_ip_adapter import LoadedIPAdapter
from .loader import LoadedMoA

FRAMINGS = (1.0, 1.5, 2.0)
"""How far down a picture is cut, in heights of the place: routers see heads, references show busts as well."""
PICTURES_AT_ONCE = 8


def encoder_of(subject: Subject, moa: LoadedMoA | None) -> LoadedMoA | LoadedIPAdapter | None:
    """What can encode pictures as the subject's reference was; None for a LoRA, which was made of no picture."""
    if subject.adapter is None:
        return moa
    return subject.adapter if isinstance(subject.adapter, LoadedIPAdapter) else None


def likeness(
    subject: Subject, encoder: LoadedMoA | LoadedIPAdapter, images: Tensor, places: Tensor, numbers: list[int]
) -> list[float | None]:
    """The cosine between the features of the reference and of the subject's place, for every picture.

    images [B, H, W, 3]; places [B, H, W], 1 where the subject is; numbers: of the pictures in the whole batch. How the
    reference was cut is not known any more, so the most alike of several framings counts. None for a picture that the
    subject is not found in.
    """
    found = [n for n, place in enumerate(places) if bool(place.any())]
    alike: list[float | None] = [None] * len(images)
    for start in range(0, len(found), PICTURES_AT_ONCE):
        some = found[start : start + PICTURES_AT_ONCE]
        own = torch.stack([subject.feature(numbers[n]) for n in some]).float().cpu()  # [P, F]
        cosines = []
        for framing in FRAMINGS:
            mm.throw_exception_if_processing_interrupted()
            prepared = torch.stack([_prepared(encoder, images[n], places[n], framing) for n in some])
            cosines.append(torch.cosine_similarity(own, encoder.encode(prepared), dim=1))
        for n, cosine in zip(some, torch.stack(cosines).amax(dim=0).tolist(), strict=True):
            alike[n] = cosine
    return alike


def _prepared(encoder: LoadedMoA | LoadedIPAdapter, picture: Tensor, place: Tensor, framing: float) -> Tensor:
    """The place in a picture as the encoder is shown it; an IP-Adapter's sees what is behind a person, a MoA's not."""
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
