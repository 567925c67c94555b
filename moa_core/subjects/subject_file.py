"""The subject file: an identity without its photo, in one .safetensors file."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files.file_error import FileError, unreadable
from ..files.whole_file import whole
from .subject import FACE_WIDTH, EncoderId, Subject

FORMAT = "moa-subject"
FORMAT_VERSION = "1"
TENSORS = {"features": "[variants, width]", "area": "[masks, height, width]", "face": f"[variants, {FACE_WIDTH}]"}
"""What a file may hold, and its shape; features must be there."""
AGAIN = "save the subject again with Save Subject, or download the file again"


class SubjectFileError(FileError):
    """Why a subject file is refused."""


def save_subject(subject: Subject, path: str | os.PathLike) -> None:
    """Write the file whole or not at all. Raises ValueError for a subject whose encoder is not known."""
    if subject.encoder is None:
        raise ValueError(
            f"'{subject.name}' does not say which image encoder made it, so that nobody could tell which MoA reads it. "
            "Encode it with Subject Encoder"
        )
    held = {"features": subject.features, "area": subject.area, "face": subject.face}
    tensors = {
        n: tensor.detach().to("cpu", torch.float32).contiguous() for n, tensor in held.items() if tensor is not None
    }
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "word": subject.word,
        "name": subject.name,
        "weight": repr(float(subject.weight)),
        "moa": subject.encoder.moa,
        "image_encoder": subject.encoder.fingerprint,
    }
    with whole(Path(path)) as unfinished:
        save_file(tensors, unfinished, metadata)


def load_subject(path: str | os.PathLike) -> Subject:
    """Read a subject file onto the CPU. Raises SubjectFileError for a file that is damaged or no subject file."""
    path = Path(path)
    metadata, tensors = _read(path)
    if "features" not in tensors:
        raise SubjectFileError(path.name, "holds no features", AGAIN)
    for name, tensor in tensors.items():
        _check(path, name, tensor)
    features, face = tensors["features"], tensors.get("face")
    if face is not None and face.shape != (len(features), FACE_WIDTH):
        found = f"expected {[len(features), FACE_WIDTH]}, as its features have it, found {list(face.shape)}"
        raise SubjectFileError(path.name, f"has a damaged face: {found}", AGAIN)
    word, name, weight, moa, fingerprint = (
        _text(path, metadata, key) for key in ("word", "name", "weight", "moa", "image_encoder")
    )
    encoder = EncoderId(fingerprint, moa)
    return Subject(features, word, name, _weight(path, weight), tensors.get("area"), encoder, face=face)


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file of this format and version, or a sentence why not."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_format(path, metadata)
            names = set(file.keys())
            for name in sorted(names - TENSORS.keys()):
                raise SubjectFileError(path.name, f"holds what no subject has, '{name}'", AGAIN)
            return metadata, {name: file.get_tensor(name) for name in names}
    except FileNotFoundError:
        advice = "put it into ComfyUI's models/moa_subjects folder"
        raise SubjectFileError(str(path), "does not exist", advice) from None
    except (SafetensorError, OSError) as error:
        raise SubjectFileError(path.name, unreadable(path, error), AGAIN) from error


def _check_format(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        found = metadata.get("format", "none")
        problem = f"is no subject file: expected the format '{FORMAT}' in its metadata, found '{found}'"
        raise SubjectFileError(path.name, problem, "pick a file that Save Subject has written")
    if metadata.get("format_version") != FORMAT_VERSION:
        found = metadata.get("format_version", "none")
        problem = f"has format version '{found}', and this version of the pack reads version '{FORMAT_VERSION}'"
        raise SubjectFileError(path.name, problem, "update the pack, or save the subject again")


def _check(path: Path, name: str, tensor: Tensor) -> None:
    expected = f"expected finite float32 numbers {TENSORS[name]}"
    if tensor.dtype != torch.float32 or tensor.ndim != TENSORS[name].count(",") + 1 or not tensor.numel():
        found = f"{tensor.dtype} {list(tensor.shape)}"
    elif not tensor.isfinite().all():
        found = "NaN or infinite numbers"
    else:
        return
    raise SubjectFileError(path.name, f"has damaged {name}: {expected}, found {found}", AGAIN)


def _text(path: Path, metadata: dict[str, str], key: str) -> str:
    if key not in metadata:
        raise SubjectFileError(path.name, f"lacks '{key}' in its metadata", AGAIN)
    return metadata[key]


def _weight(path: Path, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0.0 <= weight < math.inf:
        raise SubjectFileError(path.name, f"has the weight '{text}', expected a number of 0 or more", AGAIN)
    return weight
