"""The masks of reference pictures, white on the person, and of the places where somebody may appear."""

from __future__ import annotations

import logging

import torch.nn.functional as F
from torch import Tensor

from ..host.messages import Message

TALL = 1.1
"""Height over width from which on a middle square may lose a head."""


def reference_masks(image: Tensor, mask: Tensor | None) -> list[Tensor | None]:
    """One mask [H, W] or None for every picture of image [P, H, W, 3 or 4]."""
    count, height, width, channels = image.shape
    if mask is None:
        if channels < 4:
            return [None] * count
        logging.info("MoA: the reference picture has an alpha channel; it serves as the mask.")
        mask = image[..., 3]
    mask = _planes(mask, "mask")
    if mask.shape[0] not in (1, count):
        raise ValueError(f"{mask.shape[0]} masks for {count} pictures. Connect one mask, or one for each picture")
    if mask.shape[1:] != (height, width):
        mask = F.interpolate(mask[:, None].float(), (height, width), mode="bilinear", align_corners=False)[:, 0]
    masks = [m if bool((m > 0.5).any()) else None for m in mask.expand(count, -1, -1)]
    if None in masks:  # LoadImage hands out black masks for pictures without transparency
        logging.info("MoA: an all-black mask counts as none; the whole reference picture is used.")
    return masks


def doubts(image: Tensor, mask: Tensor | None, masks: list[Tensor | None], middle_alone: bool = False) -> list[Message]:
    """What may be wrong with a mask that was connected, or with having none; masks: as they are used.

    middle_alone: whether of some picture the middle square alone is encoded.
    """
    found = []
    used = [m for m in masks if m is not None]
    height, width = image.shape[1:3]
    if middle_alone and height > TALL * width:
        found.append(
            Message(
                "A tall photo: the head may be cut off.",
                f"The picture is {width}x{height}, and without a mask its middle square alone is encoded. Connect a "
                "mask of the person, or a square picture of the face; the node shows what it encodes.",
            )
        )
    if mask is None or not used:
        return found
    size, wanted = mask.shape[-2:], image.shape[1:3]
    if size != wanted and mask.min() < mask.max():  # of one colour: Load Image's for a picture without transparency
        found.append(
            Message(
                f"The mask is {size[1]}x{size[0]}, the picture {wanted[1]}x{wanted[0]}.",
                "The mask is scaled. Connect the mask of this picture to Subject Encoder.",
            )
        )
    if any(map(_is_background, used)):
        found.append(
            Message(
                "The mask looks like the background: try InvertMask.",
                "It covers the edge of the picture and less of its middle. Load Image's MASK is white where the "
                "picture is transparent; Subject Encoder wants white on the person.",
            )
        )
    return found


def subject_area(area: Tensor | None) -> Tensor | None:
    """[M, H, W], or None for all of the picture."""
    if area is None:
        return None
    area = _planes(area, "area")
    if not bool((area > 0).any()):
        logging.info("MoA: an all-black area counts as none; the person may appear anywhere.")
        return None
    return area


def _planes(mask: Tensor, widget: str) -> Tensor:
    """A mask [H, W], [B, H, W], or [B, 1, H, W] and [B, H, W, 1] as some nodes hand them out, as [B, H, W].

    Raises ValueError for anything else: a picture, for example.
    """
    if mask.ndim == 4 and mask.shape[1] == 1:
        return mask[:, 0]
    if mask.ndim == 4 and mask.shape[3] == 1:
        return mask[..., 0]
    if mask.ndim not in (2, 3):
        raise ValueError(
            f"'{widget}' has the shape {list(mask.shape)}: expected a MASK [pictures, height, width]. Connect a mask, "
            "or put Convert Image to Mask between"
        )
    return mask[None] if mask.ndim == 2 else mask


def _is_background(mask: Tensor) -> bool:
    """Whether a mask [H, W] covers most of the picture's edge, and of what lies inside a good deal less."""
    inside = mask[1:-1, 1:-1]
    edge = (mask.sum() - inside.sum()) / (mask.numel() - inside.numel())
    return bool(edge > 0.6 and inside.mean() < 0.9 * edge)
