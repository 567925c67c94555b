"""Which kind of image tokens a file makes, told by the names of its weights."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..subjects.subject import FACE_WIDTH
from .face_tokens import FacePlusTokens, FaceResampler, FaceTokens
from .image_tokens import GridTokens, ImageTokens, Perceiver, PooledTokens, Resampler

PERCEIVER = "perceiver_resampler."


def image_tokens(weights: Mapping[str, Tensor], is_v2: bool = False) -> ImageTokens:
    """The projector with these weights. is_v2: of a FaceID plus file, whose weights do not say it.

    Raises ValueError for names of no known kind, KeyError or RuntimeError for weights that do not fit together.
    """
    if "latents" in weights:
        shape = _perceiver_shape(weights)
        kind = FaceResampler if shape["width"] == FACE_WIDTH else Resampler  # CLIP vision models' outputs are wider
        tokens = kind(count=weights["latents"].shape[1], **shape)
    elif "proj.weight" in weights:
        tokens = PooledTokens(weights["proj.weight"].shape[1], weights["norm.weight"].shape[0])
    elif "proj.3.weight" in weights:
        tokens = GridTokens(weights["proj.0.weight"].shape[1], weights["proj.2.weight"].shape[0])
    elif "norm.weight" in weights:
        tokens = _face_tokens(weights, is_v2)
    else:
        raise ValueError("the names are of no known kind")
    tokens.load_state_dict(weights)
    return tokens.float().eval().requires_grad_(False)


def _face_tokens(weights: Mapping[str, Tensor], is_v2: bool) -> FaceTokens:
    inner, face_width = weights["proj.0.weight"].shape
    dim = weights["norm.weight"].shape[0]
    count = weights["proj.2.weight"].shape[0] // dim
    read = {n.removeprefix(PERCEIVER): weight for n, weight in weights.items() if n.startswith(PERCEIVER)}
    if not read:
        return FaceTokens(face_width, inner, count, dim)
    return FacePlusTokens(face_width, inner, count, Perceiver(**_perceiver_shape(read)), is_v2)


def _perceiver_shape(weights: Mapping[str, Tensor]) -> dict[str, int]:
    hidden, width = weights["proj_in.weight"].shape
    return {
        "width": width,
        "dim": weights["proj_out.weight"].shape[0],
        "hidden": hidden,
        "inner": weights["layers.0.0.to_q.weight"].shape[0],
        "feed_forward": weights["layers.0.1.1.weight"].shape[0],
        "depth": 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers.")),
    }
