"""Faces in photos, found and embedded by insightface: other packs' loaders hand it out, or its package is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import folder_paths
import torch
import torch.nn.functional as F
from torch import Tensor

from ...moa_core.adapters.ip_adapter_file import ANTELOPE, BUFFALO
from ...moa_core.subjects.face_crop import face_crop
from ..host.messages import Message

RECOGNIZERS = {BUFFALO: "w600k_r50", ANTELOPE: "glintr100"}
"""Of each of insightface's sets of models the one that makes the embedding."""
LOOKED_AT = (640, 640)
"""Pixels that the detector sees of a photo."""
LEFT_OUT = Message("left out.", "insightface finds none there. Use photos with the face large and well lit.")
"""What becomes of a photo without a face, where people are known by the face."""


@dataclass(frozen=True, eq=False)
class Face:
    """The largest face of a photo."""

    embedding: Tensor
    """[512]"""
    points: Tensor
    """[5, 2], x and y in pixels of the photo: eyes, nose, corners of the mouth."""
    crop: Tensor
    """[224, 224, 3] in 0..1."""
    others: int
    """How many more faces there are."""

    @property
    def normalized(self) -> Tensor:
        """The embedding [512], of length 1."""
        return F.normalize(self.embedding, dim=0)


def face_analysis(given: Any, models: str, file: str) -> Any:
    """insightface's FaceAnalysis for a file that reads embeddings of that set of models: what is given, or our own.

    Raises ValueError where there is none, or one of other models.
    """
    if given is not None and not callable(getattr(given, "get", None)):
        raise ValueError(
            f"MoA From IP-Adapter: what is connected to insightface is a {type(given).__name__} without insightface's "
            "`get`. Connect the INSIGHTFACE of a loader for IP-Adapters"
        )
    analysis, wanted = _installed(models, file) if given is None else given, RECOGNIZERS[models]
    which = "the INSIGHTFACE connected here" if given is not None else f"what is in {_folder(models)}"
    own = getattr(analysis, "models", None) or {}
    found = Path(getattr(own.get("recognition"), "model_file", None) or "").stem
    lacks = own and "recognition" not in own
    if lacks or (found in RECOGNIZERS.values() and found != wanted):
        raise ValueError(
            f"MoA From IP-Adapter: '{file}' reads the faces of insightface's {models}, and {which} "
            f"{f'lacks the model that makes them, {wanted}' if lacks else f'uses {found}'}. Choose all of {models}"
        )
    return analysis


def _folder(models: str) -> str:
    """Where everyone keeps a set of models, in the models folder."""
    return f"models/insightface/models/{models}"


def _installed(models: str, file: str) -> Any:
    """With models from where everyone keeps them; insightface itself would fetch them from the network."""
    folder = Path(folder_paths.models_dir, "insightface", "models", models)
    if importlib.util.find_spec("insightface") is None:
        raise ValueError(
            f"MoA From IP-Adapter: '{file}' knows people by the face embeddings of insightface, and the Python package "
            "`insightface` is not installed. Install it (pip install insightface onnxruntime), or connect another "
            "pack's INSIGHTFACE"
        )
    if not any(folder.glob("*.onnx")):
        raise ValueError(
            f"MoA From IP-Adapter: '{file}' reads the faces of insightface's {models}, and there is no .onnx file in "
            f"{_folder(models)}. Put the files of insightface's {models}.zip there"
        )
    try:
        return _loaded(models)
    except ImportError as reason:
        raise ValueError(
            f"MoA From IP-Adapter: '{file}' knows people by the face embeddings of insightface, which lacks something "
            f"({reason}). Install it with what it needs (pip install insightface onnxruntime)"
        ) from reason
    except Exception as reason:  # whatever a damaged or a missing file leads to
        raise ValueError(
            f"MoA From IP-Adapter: '{file}' reads the faces of insightface's {models}, and insightface cannot use the "
            f"files in {_folder(models)} ({reason!r}). Put all files of insightface's {models}.zip there anew"
        ) from reason


@cache
def _loaded(models: str) -> Any:
    from insightface.app import FaceAnalysis  # slow, and not everyone has it

    analysis = FaceAnalysis(name=models, root=str(Path(folder_paths.models_dir, "insightface")))
    analysis.prepare(ctx_id=0, det_size=LOOKED_AT)
    return analysis


def find_face(analysis: Any, picture: Tensor, mask: Tensor | None, form: str) -> Face | None:
    """The largest face of a picture [H, W, 3] whose middle is in the mask [H, W]; None: there is no face.

    form: of the embedding, by insightface's name.
    """
    # A face that fills the picture is too large for the detector: then it looks from twice as far away.
    for margin in (0, max(picture.shape[:2]) // 2):
        seen = _seen(analysis, picture, margin)
        found = largest_first([torch.as_tensor(face.bbox) - margin for face in seen], mask)
        if found:
            largest = seen[found[0]]
            points = torch.as_tensor(largest.kps).float() - margin
            embedding = torch.as_tensor(getattr(largest, form)).float().flatten()
            return Face(embedding, points, face_crop(picture, points), len(found) - 1)
    return None


def mean_face(faces: Sequence[Face]) -> Tensor:
    """[1, 512]: see Subject.face."""
    return torch.stack([face.normalized for face in faces]).mean(dim=0, keepdim=True)


def largest_first(boxes: Sequence[Sequence[float]], mask: Tensor | None) -> list[int]:
    """The numbers of those faces' boxes (left, top, right, bottom) whose middle is in the mask [H, W]."""
    found = [number for number, box in enumerate(boxes) if mask is None or _within(mask, box)]
    return sorted(found, key=lambda number: _area(boxes[number]), reverse=True)


def _seen(analysis: Any, picture: Tensor, margin: int) -> list:
    """insightface's faces of a picture in a black frame."""
    pixels = (picture.clamp(0, 1) * 255).round().to("cpu", torch.uint8)
    framed = F.pad(pixels, (0, 0, margin, margin, margin, margin))
    found = analysis.get(framed.flip(-1).contiguous().numpy())  # it takes blue, green, red
    return [face for face in found if face.embedding is not None]  # one that it judges not real has none


def _area(box: Sequence[float]) -> float:
    """Of (left, top, right, bottom)."""
    return float((box[2] - box[0]) * (box[3] - box[1]))


def _within(mask: Tensor, box: Sequence[float]) -> bool:
    column, row = (int((box[n] + box[n + 2]) // 2) for n in (0, 1))
    return 0 <= row < mask.shape[0] and 0 <= column < mask.shape[1] and bool(mask[row, column] > 0.5)


def face_doubts(found: Sequence, without: Message = LEFT_OUT) -> list[Message]:
    """What is to be said of photos, of which some have no face (None), and some several (their `others`)."""
    said = []
    faceless = [number for number, face in enumerate(found, 1) if face is None]
    if faceless:
        said.append(Message(f"No face in picture {_listed(faceless)}: {without.short}", without.more))
    crowded = [number for number, face in enumerate(found, 1) if face is not None and face.others]
    if crowded:
        said.append(
            Message(
                f"Several faces in picture {_listed(crowded)}: the largest is taken.",
                "The preview shows it. Connect a mask of the person, or cut the photo.",
            )
        )
    return said


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
