"""A subject: what an image encoder makes of a reference picture, or what an adapter knows, and the word it binds to."""

from __future__ import annotations

import math
import uuid
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FACE_WIDTH = 512
"""Of insightface's embedding of a face."""


@dataclass(frozen=True)
class EncoderId:
    """Which image encoder made a subject's features; equal where they can be read alike, whatever the file's name."""

    fingerprint: str
    moa: str = field(compare=False)
    """Name of the MoA it belongs to, for messages."""


@dataclass(frozen=True, eq=False)  # told apart by its key: two people may share a word
class Subject:
    """features [V, F]: V variants, matched to the pictures of a batch by index; one for every picture if V = 1.

    Of a subject that appears by deltas they say how much of each of its F files. A copy is the same subject, whoever
    made it.
    """

    features: Tensor
    word: str
    name: str
    weight: float = 1.0
    """How much of the reference comes through: 0 is the plain word, 1 as trained."""
    area: Tensor | None = None
    """[M, H, W] in 0..1: where in the picture the subject may appear, the n-th for the n-th picture; None: anywhere."""
    encoder: EncoderId | None = None
    """None: not known."""
    adapter: Any = None
    """What the subject appears by, where that is no learned MoA: the host's own, and nothing that this looks into."""
    face: Tensor | None = None
    """[V, 512], where the encoder knows people by the face: the mean of the photos' normalized embeddings. No expert
    reads it; its product with the normalized embedding of another face is the mean of their cosines."""
    key: str = field(default_factory=lambda: uuid.uuid4().hex, repr=False)
    """Its copies have the same."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Subject) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)

    def __deepcopy__(self, memo: dict) -> Subject:
        return self  # it never changes, and what it appears by is large

    def twin(self) -> Subject:
        """The same person once more, in another place: a subject of its own."""
        return replace(self, key=uuid.uuid4().hex)

    @property
    def variants(self) -> int:
        return self.features.shape[0]

    def feature(self, index: int) -> Tensor:
        """The feature [F] for the picture of that index in the batch; more pictures than variants start over."""
        return self.features[index % self.variants]

    def area_in(self, index: int, size: tuple[int, int]) -> Tensor:
        """The area [h, w] in the picture of that index, at that size, on the CPU; 1 everywhere where none is given."""
        if self.area is None:
            return torch.ones(size)
        area = self.area[index % len(self.area)].float().cpu()
        return F.interpolate(area[None, None], size, mode="area")[0, 0].clamp(0.0, 1.0)


def interpolate(a: Subject, b: Subject, amount: float, frames: int = 1, method: str = "linear") -> Subject:
    """A subject between a (amount 0) and b (amount 1), bound to a's word.

    frames > 1 gives that many variants from a to b, ends included, and does not use amount. method:
    "linear", or "slerp" for every feature vector along the arc. Raises ValueError where a and b do not fit.
    """
    if a.encoder and b.encoder and a.encoder != b.encoder:
        raise ValueError(
            f"subject_a was encoded with '{a.encoder.moa}', subject_b with '{b.encoder.moa}', which has another image "
            "encoder. Encode both with the same MoA"
        )
    widths = [subject.features.shape[-1] for subject in (a, b)]
    if a.encoder is not None and a.encoder == b.encoder:  # tokens of more photos, or of fewer, over and over
        a, b = (replace(s, features=s.features.repeat(1, math.lcm(*widths) // s.features.shape[-1])) for s in (a, b))
    if a.features.shape[-1] != b.features.shape[-1]:
        raise ValueError(
            f"subject_a has features of width {a.features.shape[-1]}, subject_b of {b.features.shape[-1]}: "
            "they come from different MoA files. Encode both with the same MoA"
        )
    if frames > 1 and (a.variants > 1 or b.variants > 1):
        raise ValueError(
            f"subject_a has {a.variants} and subject_b {b.variants} variants already: set frames to 1, "
            "or connect subjects straight from Subject Encoder"
        )
    if a.variants != b.variants and 1 not in (a.variants, b.variants):
        raise ValueError(f"subject_a has {a.variants} variants and subject_b {b.variants}: make them equal, or one 1")
    if method not in ("linear", "slerp"):
        raise ValueError(f"method is '{method}': expected linear or slerp")
    blend = torch.lerp if method == "linear" else _slerp

    def between(start: Tensor, end: Tensor) -> Tensor:
        """[V, F] and [V, F] -> [V or frames, F]."""
        start, end = torch.broadcast_tensors(start, end.to(start))
        if frames > 1:
            weight = torch.linspace(0.0, 1.0, frames, dtype=start.dtype, device=start.device)[:, None]  # [frames, 1]
            start, end = start.expand(frames, -1), end.expand(frames, -1)
        else:
            weight = torch.full_like(start[:, :1], amount)
        return blend(start, end, weight)

    shown = a.weight + (b.weight - a.weight) * amount if frames == 1 else a.weight
    name, encoder = f"{a.name} - {b.name}", a.encoder or b.encoder
    features = between(a.features, b.features)
    face = None if a.face is None or b.face is None else between(a.face, b.face)
    return Subject(features, a.word, name, shown, a.area, encoder, a.adapter, face)


def _slerp(start: Tensor, end: Tensor, weight: Tensor) -> Tensor:
    """Along the arc between the vectors of two [V, F] tensors; straight where they (nearly) share a line."""
    cosine = torch.cosine_similarity(start.double(), end.double(), dim=-1)[:, None].clamp(-1.0, 1.0)
    angle = cosine.acos()
    sine = angle.sin()
    on_a_line = sine < 1e-6
    sine = sine.where(~on_a_line, 1.0)
    arc = ((1 - weight) * angle).sin() / sine * start + (weight * angle).sin() / sine * end
    return arc.to(start).where(~on_a_line, torch.lerp(start, end, weight))
