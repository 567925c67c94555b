"""The picture of a trace: the subject area over the image, and the expert's share by block and timestep."""

import math
import textwrap

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...moa_core.routing.trace import Trace

CELL, GAP, LABEL, HEAD, LEGEND = 48, 4, 88, 64, 72
INK, PAPER, FAINT = (235, 235, 240), (24, 24, 28), (150, 150, 160)
# Dark blue over violet and orange to pale yellow: even steps of lightness, so that grey prints read as well.
STOPS = np.array([(8, 8, 40), (84, 15, 109), (186, 54, 85), (249, 140, 10), (252, 255, 190)], dtype=np.float32)


def draw_trace(trace: Trace, area: Tensor, index: int, image: Tensor | None) -> Tensor:
    """One picture of the batch: area [h, w], the picture's index, image [H, W, 3] or None -> [H', W', 3] in 0..1."""
    maps = {layer: trace.maps(layer)[index] for layer in trace.layers}  # [bins, h, w] each
    top = _scale(max(float(share.max()) for share in (area, *maps.values())))
    blocks = list(dict.fromkeys(address for address, _ in maps))
    half = len(trace.timesteps) * (CELL + GAP)
    height = len(blocks) * (CELL + GAP)
    side = min(max(height, 6 * CELL), 512)
    left = side + 3 * GAP + LABEL
    width = max(left + 2 * half + 3 * GAP + LEGEND, left + 520)
    canvas = Image.new("RGB", (width, HEAD + max(height, side) + 2 * GAP), PAPER)
    draw, font, small = ImageDraw.Draw(canvas), ImageFont.load_default(18), ImageFont.load_default(12)
    draw.text((2 * GAP, 10), "subject area", INK, font)
    canvas.paste(_overlay(area / top, image, side), (GAP, HEAD))

    for row, address in enumerate(blocks):
        draw.text((side + 4 * GAP, HEAD + row * (CELL + GAP) + CELL // 2 - 7), str(address), FAINT, small)
    for attention, title, start in (
        ("attn1", "self-attention", left),
        ("attn2", "cross-attention", left + half + 2 * GAP),
    ):
        draw.text((start, 10), title, INK, font)
        for column, (_, last) in enumerate(trace.timesteps):
            draw.text((start + column * (CELL + GAP), 42), f"t<{last}", FAINT, small)
        recorded = any(kind == attention for _, kind in maps)
        for row, address in enumerate(blocks):
            if recorded and (address, attention) not in maps:
                draw.text((start, HEAD + row * (CELL + GAP) + CELL // 2 - 7), "no expert", FAINT, small)
            for column, share in enumerate(maps.get((address, attention), ())):
                cell = _paint(share / top).resize((CELL, CELL), Image.Resampling.NEAREST)
                canvas.paste(cell, (start + column * (CELL + GAP), HEAD + row * (CELL + GAP)))
    _colour_bar(canvas, draw, small, width - LEGEND, top)
    return torch.from_numpy(np.asarray(canvas).astype(np.float32) / 255.0)


def _scale(largest: float) -> float:
    """Where the colours end: the largest share, rounded up, as routers may give all to the prior but a tenth."""
    return min(max(math.ceil(largest * 20 - 0.01), 1), 20) / 20


def draw_sentences(sentences: list[str], image: Tensor | None) -> Tensor:
    """Words where there is no trace to draw, beside the picture [H, W, 3] if there is one -> [H', W', 3] in 0..1."""
    side, width, line = 6 * CELL, 60, 24
    lines = [text for sentence in sentences for text in [*textwrap.wrap(sentence, width), ""]]
    left = GAP if image is None else side + 3 * GAP
    canvas = Image.new("RGB", (left + 560, max(side, line * len(lines)) + 2 * GAP), PAPER)
    if image is not None:
        canvas.paste(_picture(image, side), (GAP, GAP))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(18)
    for number, text in enumerate(lines):
        draw.text((left + GAP, 2 * GAP + line * number), text, INK, font)
    return torch.from_numpy(np.asarray(canvas).astype(np.float32) / 255.0)


def batched(pictures: list[Tensor]) -> Tensor:
    """Pictures [H, W, 3] of any sizes as a batch; the smaller ones have a margin below and on the right."""
    height, width = (max(picture.shape[side] for picture in pictures) for side in (0, 1))
    batch = torch.tensor(PAPER).div(255.0).repeat(len(pictures), height, width, 1)
    for whole, picture in zip(batch, pictures, strict=True):
        whole[: picture.shape[0], : picture.shape[1]] = picture
    return batch


def _overlay(area: Tensor, image: Tensor | None, side: int) -> Image.Image:
    """The area in colours, over the picture where there is one, in a square of that side."""
    heat = _paint(area)
    if image is None:
        return heat.resize(_fit(heat.size, side), Image.Resampling.NEAREST)
    picture = _picture(image, side)
    return Image.blend(picture, heat.resize(picture.size, Image.Resampling.BICUBIC), 0.55)


def _picture(image: Tensor, side: int) -> Image.Image:
    picture = Image.fromarray((image[..., :3].clamp(0, 1) * 255).byte().cpu().numpy())
    return picture.resize(_fit(picture.size, side), Image.Resampling.LANCZOS)


def _fit(size: tuple[int, int], side: int) -> tuple[int, int]:
    scale = side / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _paint(share: Tensor) -> Image.Image:
    """[h, w], 0 to the scale's end at 1 -> a picture of the same size in the scale's colours."""
    place = share.float().clamp(0, 1).cpu().numpy() * (len(STOPS) - 1)
    low = np.minimum(place.astype(int), len(STOPS) - 2)
    weight = (place - low)[..., None]
    return Image.fromarray((STOPS[low] * (1 - weight) + STOPS[low + 1] * weight).astype(np.uint8))


def _colour_bar(
    canvas: Image.Image, draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont, left: int, top: float
) -> None:
    height = 4 * CELL
    bar = _paint(torch.linspace(1.0, 0.0, height)[:, None].expand(-1, 16))
    canvas.paste(bar, (left, HEAD))
    for share in (1.0, 0.5, 0.0):
        draw.text((left + 22, HEAD + (1.0 - share) * (height - 12)), f"{share * top:.2g}", FAINT, font)
    draw.text((left, HEAD + height + GAP), "expert's", FAINT, font)
    draw.text((left, HEAD + height + GAP + 14), "share", FAINT, font)
