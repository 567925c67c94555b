"""Weights for the host's own face landmarker that find the faces of face_pictures.photo.

A face there is a square of pure red; here its green is four times its side, from which the detector takes its size.
What is far away is bluish: the detector for faces far away finds squares of pure blue, and those alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

SIDE = 2 * 4 / 255
"""Green of a face as a detector sees it (0 is none, 2 all), for each pixel of its side in a picture of the detector's
size: 128, and 192 for faces far away."""
NOSE, FOREHEAD, CHIN = (96.0, 96.0), (96.0, 32.0), (96.0, 160.0)
"""In the mesh's square of 192, of which the detector's box is the inner two thirds."""


def landmarker_weights() -> dict[str, Tensor]:
    """Of a whole file."""
    from comfy_extras.mediapipe.face_landmarker import FaceLandmarker

    weights = {
        name.replace("detector.", f"detector_{distance}.", 1): torch.zeros_like(weight)
        for distance in ("short", "full")
        for name, weight in FaceLandmarker(detector_variant=distance).state_dict().items()
    }
    see_corners(weights)
    see_corners_far_away(weights)
    angles = torch.linspace(0, 2 * torch.pi, 478)
    mesh = torch.stack([96 + 50 * angles.sin(), 96 - 64 * angles.cos(), 20 * angles.cos()], dim=1)
    mesh[[1, 10, 152], :2] = torch.tensor([NOSE, FOREHEAD, CHIN])
    weights["mesh.head_landmarks.bias"] += mesh.flatten()
    for part in ("face_oval", "left_eye", "right_eye", "left_eyebrow", "right_eyebrow", "lips", "irises", "nose"):
        weights[f"topology.{part}"] = torch.tensor([[0, 1]], dtype=torch.int32)
    geometry = {
        "canonical_vertices": mesh,
        "procrustes_indices": torch.arange(478),
        "procrustes_weights": torch.ones(478),
    }
    return weights | geometry


def see_corners(weights: dict[str, Tensor]) -> None:
    """Its first layer fires (channel 0) at the left top corner of a red square, and says how green it is (channel 1);
    its blocks hand on what is highest."""
    stem, bias = weights["detector_short.stem.weight"], weights["detector_short.stem.bias"]
    red = torch.tensor([1.0, 0.0, -1.0])  # 2 in a face, -2 in one that is far away, 0 elsewhere
    stem[0, :, 2, 2], stem[0, :, 2, 0], stem[0, :, 0, 2] = 3 * red, -red, -red
    bias[0] = -5.0
    stem[1, :, 2, 2] = torch.tensor([10.0, 1.0, -10.0])
    bias[1] = -19.0
    weights["detector_short.cls_16.weight"][0, 0] = 20.0
    weights["detector_short.cls_16.bias"] += torch.tensor([-10.0, -20.0])
    weights["detector_short.cls_8.bias"] -= 20
    for place, sides in enumerate((0.5, 0.5, 1.0, 1.0)):  # the box's middle is half a side from the corner
        weights["detector_short.reg_16.weight"][place, 1] = sides / SIDE
    weights["detector_short.reg_16.bias"][6] = 10.0  # the other eye is to the right: the face is upright


def see_corners_far_away(weights: dict[str, Tensor]) -> None:
    """The same of blue squares at multiples of 4 pixels: of the feature maps the largest alone counts, 48 wide."""
    far = {name.removeprefix("detector_full."): weight for name, weight in weights.items() if "_full." in name}
    blue = torch.tensor([-1.0, 0.0, 1.0])
    stem = far["stem.weight"]
    stem[0, :, 1, 1], stem[0, :, 1, 0], stem[0, :, 0, 1] = 3 * blue, -blue, -blue
    stem[1, :, 1, 1] = torch.tensor([-10.0, 1.0, 10.0])
    far["stem.bias"][:2] = torch.tensor([-5.0, -19.0])
    for channel, share in enumerate((1.0, 0.25)):  # halving the map: the one that fires of four, and their mean
        far["backbone.2.dw1.weight"][channel, 0, 1:, 1:] = share
        far["backbone.2.dw2.weight"][channel, 0, 1, 1] = 1.0
        for handed_on in ("backbone.2.pw1", "backbone.2.pw2", "lateral_convs.0"):
            far[f"{handed_on}.weight"][channel, channel] = 1.0
    far["cls_conv.weight"][:, 0] = 20.0
    far["cls_conv.bias"] -= 10.0
    for row in range(2):  # the heads look at every second place and say four things: of it and of its neighbours
        for column in range(2):
            far["cls_dw.weight"][2 * row + column, 0, 1 + row, 1 + column] = 1.0
            own = slice(16 * (2 * row + column), 16 * (2 * row + column + 1))
            far["reg_dw.weight"][own, 0, 1 + row, 1 + column] = 1.0
            far["reg_conv.weight"][own, 1][:4, 0, 0] = torch.tensor([0.5, 0.5, 1.0, 1.0]) / SIDE
            far["reg_conv.bias"][own][6] = 10.0
