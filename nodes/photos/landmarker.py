"""Photos cut to the face, which ComfyUI's own landmarker (MediaPipe's, from 0.23 on) finds in them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import comfy.utils
import folder_paths
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...moa_core.files.file_error import FileError
from ...moa_core.subjects.head_crop import head_square
from ...moa_core.subjects.reference import square_at
from ..host.messages import Message
from .faces import largest_first

HOSTS_MODULE = "comfy_extras.nodes_mediapipe"
FOLDER, FILE = "detection", "mediapipe_face_fp32.safetensors"
GET = f"{FILE} from https://huggingface.co/Comfy-Org/mediapipe"
PARTS = ("detector_short.", "detector_full.", "mesh.")
"""What the names of such a file's weights begin with; the folder is for detectors of all kinds."""
SURE = 0.5
"""How sure of a face the detector must be; the host's own node begins with it."""
NOT_CUT = Message(
    "not cut to it.",
    "ComfyUI's face detection finds none there: the mask or, without one, the middle is taken, as without `face`.",
)


@dataclass(frozen=True, eq=False)
class CutPhoto:
    """The square round the largest face of a photo, with hair and chin."""

    picture: Tensor
    """[S, S, 3]"""
    mask: Tensor | None
    """[S, S], of the same place."""
    others: int
    """How many more faces there are."""


def face_landmarker() -> Any:
    """The host's FaceLandmarkerModel. Raises ValueError where the host has none, or no weights for it."""
    if importlib.util.find_spec(HOSTS_MODULE) is None or FOLDER not in folder_paths.folder_names_and_paths:
        raise ValueError(
            "Subject Encoder: `face` cuts photos by ComfyUI's own face detection, which this ComfyUI does not have. "
            "Update ComfyUI (to 0.23 or later), or switch `face` off and connect a mask"
        )
    return _loaded(folder_paths.get_full_path_or_raise(FOLDER, _model_file()))


def cut_to_face(landmarker: Any, picture: Tensor, mask: Tensor | None) -> CutPhoto | None:
    """A picture [H, W, 3] cut to its largest face whose middle is in the mask [H, W]; None: there is no face."""
    pixels = (picture.clamp(0, 1) * 255).round().to("cpu", torch.uint8).numpy()
    for distance in ("short", "full"):  # of the face from the camera: the usual one first
        (seen,) = landmarker.detect_batch([pixels], 0, SURE, distance)
        found = largest_first([face["bbox_xyxy"] for face in seen], mask)
        if found:
            points = torch.from_numpy(seen[found[0]]["landmarks_xy"])
            place = head_square(points, tuple(picture.shape[:2]))
            own = None if mask is None else square_at(mask[..., None], *place, around=(0.0,))[..., 0]
            return CutPhoto(square_at(picture, *place), own, len(found) - 1)
    return None


def _model_file() -> str:
    """The one under its usual name, or another that holds the same. Raises ValueError where there is none."""
    names = [name for name in folder_paths.get_filename_list(FOLDER) if name.endswith(".safetensors")]
    for name in sorted(names, key=lambda name: Path(name).name != FILE):
        if Path(name).name == FILE or _is_landmarker(folder_paths.get_full_path_or_raise(FOLDER, name)):
            return name
    raise ValueError(
        "Subject Encoder: `face` cuts photos by ComfyUI's own face detection, and its weights are not in "
        f"models/{FOLDER}. Put {GET} there"
    )


def _is_landmarker(path: str) -> bool:
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
    except (SafetensorError, OSError):
        return False
    return all(any(name.startswith(part) for name in names) for part in PARTS)


@cache
def _loaded(path: str) -> Any:
    from comfy_extras.nodes_mediapipe import FaceLandmarkerModel  # not every host has it

    try:
        return FaceLandmarkerModel(comfy.utils.load_torch_file(path, safe_load=True))
    except Exception as reason:  # whatever a damaged file leads to
        problem = f"in models/{FOLDER} is damaged, or not the model of ComfyUI's face detection"
        raise FileError(Path(path).name, problem, f"get {GET}") from reason
