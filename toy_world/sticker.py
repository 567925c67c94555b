"""Another way to draw the same pictures: everybody cut out as a sticker, with a white rim."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

RIM = 1 / 27
"""Its width, of the picture's side."""


def stickers(picture: Image.Image, people: np.ndarray) -> Image.Image:
    """RGB of any size, and where the people are [H, W] -> the same scene with a rim round all of them."""
    mask = Image.fromarray((people > 0).astype(np.uint8) * 255)
    wide = mask.filter(ImageFilter.GaussianBlur(picture.width * RIM / 2)).point(lambda value: 255 * (value > 8))
    rim = wide.filter(ImageFilter.GaussianBlur(picture.width / 240))
    return Image.composite(picture, Image.composite(Image.new("RGB", picture.size, "white"), picture, rim), mask)
