"""What to say of other nodes in a graph that MoA can work with in part alone, and what a run takes for a part."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

from torch import Tensor

from ...moa_core.address import Layer
from ..host.messages import Message

PIXELS = 8
"""Of a latent pixel, along each side."""
PARTS = Message(
    "Another node cuts the picture in a way that MoA cannot follow.",
    "It asks the checkpoint for parts or copies of the picture without saying which. People from LoRAs and IP-Adapters "
    "do not appear in those, and areas do not hold there. Of Tiled Diffusion's methods MultiDiffusion and Mixture of "
    "Diffusers are known; SpotDiffusion shifts the picture and not what goes with it.",
)
COUPLE = Message(
    "Attention Couple: words in its region prompts bind nobody.",
    "A node gives regions of the picture prompts of their own within the attention, where MoA sees the KSampler's "
    "prompt alone. Put the people's words there, or use ConditioningSetMask and ConditioningCombine: in their prompts "
    "words bind.",
)


def no_other_device(**kwargs) -> None:
    """Raises a RuntimeError: experts follow one sampling on one device."""
    raise RuntimeError(
        "MoA Patch Model: a MODEL with subjects cannot be split over several GPUs. Take MultiGPU CFG Split out of this "
        "MODEL's way; the rest of the graph stays as it is"
    )


def beside_others(foreign: Collection[Layer]) -> list[Message]:
    """Of attention layers that are another node's modules."""
    if not foreign:
        return []
    address, attention = min(foreign, key=lambda layer: (layer[0].order, layer[1]))
    return [
        Message(
            f"{len(foreign)} attention layers are another node's: MoA leaves them alone.",
            f"That node (LayerDiffuse, for one) has put modules of its own in their place ({address} {attention}, for "
            "one). Subjects act in the other layers; where none are left, nobody appears. If somebody from a LoRA or "
            "an IP-Adapter does not, those that show where the words are may be among them: connect a mask to area.",
        )
    ]


def couples(transformer_options: Mapping) -> list[Message]:
    """Whether regional prompts by attention are at work in a U-Net call."""
    patches = transformer_options.get("patches", {}).get("attn2_patch", [])
    return [COUPLE] if any("couple" in _name(patch).lower() for patch in patches) else []


def is_part_of(area: Tensor | None, size: tuple[int, int], begins_whole: bool) -> bool:
    """Whether a run of latents (h, w) shows a part of the picture that an area [M, H, W] was drawn for.

    It does if it is smaller, and of another format, or begins with a picture that nobody knows: a tile of an upscaler,
    a face of a detailer. begins_whole: with noise alone, or with what a run of a whole picture has made.
    """
    if area is None:
        return False
    height, width = (PIXELS * side for side in size)
    smaller = height <= area.shape[-2] and width <= area.shape[-1]
    if not smaller or max(area.shape[-2] - height, area.shape[-1] - width) < PIXELS:
        return False
    return not begins_whole or not _alike(size, area.shape[-2:])


def counts_as_within(areas: Mapping[int, Tensor], size: tuple[int, int]) -> Message:
    """areas: of those that are not held to, by the number of the subject."""
    sizes = ", ".join(f"subject{n}'s is for {area.shape[-1]}x{area.shape[-2]}" for n, area in areas.items())
    return Message(
        f"{PIXELS * size[1]}x{PIXELS * size[0]} is taken for a part of the area's picture, and as within it.",
        f"The area's picture is larger ({sizes}), and nothing says which part of it this is: a tile or a face, for "
        "example. The person may appear anywhere in it. For a whole picture of this size, connect an area of its size.",
    )


def _alike(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two (h, w) are of one format, but for rounding."""
    return abs(math.log(one[0] * other[1] / (one[1] * other[0]))) < 0.1


def _name(patch: object) -> str:
    """Of a function, a method, or an object that holds one."""
    held = getattr(patch, "function", patch)
    return f"{getattr(held, '__module__', '')}.{getattr(held, '__qualname__', type(held).__qualname__)}"
