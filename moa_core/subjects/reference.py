"""How a reference picture is prepared for the image encoder: the same in training and at use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's pixel statistics; the mean is also the neutral colour that replaces a subject's background."""

SMALLEST = 16
MARGIN = 0.05


def prepare_reference(image: Tensor, mask: Tensor | None, size: int) -> Tensor:
    """Crop to the subject, replace its background, pad to a square, resize, normalize.

    image: [H, W, 3] in 0..1, at least 16 pixels a side. mask: [H, W], 1 on the subject, or None for the
    whole picture. Returns [3, size, size]. Raises ValueError for a picture too small or an empty mask.
    """
    check_size(image)
    pixels = image.movedim(-1, 0).float()  # [3, H, W]
    mean = pixels.new_tensor(MEAN)[:, None, None]
    if mask is not None:
        top, bottom, left, right = _bounding_box(mask)
        mask = mask[top:bottom, left:right].to(pixels)
        pixels = torch.lerp(mean, pixels[:, top:bottom, left:right], mask)
    pixels = (pixels - mean) / pixels.new_tensor(STD)[:, None, None]
    height, width = pixels.shape[1:]
    side = max(height, width)
    over, under = side - width, side - height
    pixels = F.pad(pixels, (over // 2, over - over // 2, under // 2, under - under // 2))  # 0 is the mean colour
    return F.interpolate(pixels[None], (size, size), mode="bicubic", antialias=True)[0]


def show_reference(prepared: Tensor) -> Tensor:
    """A prepared reference [3, size, size] as a picture again: [size, size, 3] in 0..1."""
    pixels = prepared * prepared.new_tensor(STD)[:, None, None] + prepared.new_tensor(MEAN)[:, None, None]
    return pixels.clamp(0, 1).movedim(0, -1)


def check_size(image: Tensor) -> None:
    """image [H, W, 3]. Raises ValueError for a picture too small."""
    height, width, _ = image.shape
    if min(height, width) < SMALLEST:
        raise ValueError(
            f"the reference picture is {width}x{height} pixels; at least {SMALLEST}x{SMALLEST} are needed "
            "to recognise anyone. Connect a larger picture"
        )


def square_crop(image: Tensor, mask: Tensor) -> Tensor:
    """The square round the subject with what is behind it: image [H, W, 3], mask [H, W] -> [S, S, 3]."""
    top, bottom, left, right = _bounding_box(mask)
    side = max(bottom - top, right - left)
    return square_at(image, (top + bottom - side) // 2, (left + right - side) // 2, side)


def square_at(image: Tensor, top: int, left: int, side: int, around: Sequence[float] = MEAN) -> Tensor:
    """A square of an image [H, W, C], moved into it as far as it has room there -> [side, side, C].

    around: the colour that stands where the image is not large enough for a square.
    """
    height, width, channels = image.shape
    top, left = min(max(top, 0), max(height - side, 0)), min(max(left, 0), max(width - side, 0))
    shown = image[top : top + side, left : left + side]
    square = image.new_tensor(around).expand(side, side, channels).clone()
    over, before = (side - shown.shape[0]) // 2, (side - shown.shape[1]) // 2
    square[over : over + shown.shape[0], before : before + shown.shape[1]] = shown
    return square


def _bounding_box(mask: Tensor) -> tuple[int, int, int, int]:
    """top, bottom, left, right around the mask, a little enlarged."""
    rows, columns = (mask > 0.5).any(dim=1).nonzero().flatten(), (mask > 0.5).any(dim=0).nonzero().flatten()
    if len(rows) == 0:
        raise ValueError("the mask of the reference picture is empty: paint the subject white, or connect no mask")
    top, bottom, left, right = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    margin = round(MARGIN * max(bottom - top, right - left))
    height, width = mask.shape
    return max(0, top - margin), min(height, bottom + margin), max(0, left - margin), min(width, right + margin)
