"""How a record becomes an item to train on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from moa_core.subjects.reference import MARGIN, MEAN, SMALLEST, prepare_reference
from training.config import Augmentation, Data
from training.data.augmentation import augmented
from training.data.records import Record, Segment

Background = Literal["neutral", "random", "noise"]


@dataclass(frozen=True)
class Preparation:
    """How a record becomes an item to train on.

    With `augment`, a random square of the picture is taken, its side between `smallest_crop` and 1 times the
    shorter side; without it, the largest square in the middle. Subjects that then cover less than `min_area`
    of the square are left out, and of more than `max_subjects` the largest are kept, in the caption's order.
    The references come from the whole picture; what is not the subject becomes the neutral colour of the
    image encoder, a random one, or noise. With `augment`, subjects are bound with the probability `appear`, and
    references varied as `augmentation` says.
    `cached_latents` (latents.py) are those of the square in the middle, which is then taken whatever `augment` says.
    """

    size: int
    reference_size: int
    max_subjects: int = 4
    augment: bool = True
    smallest_crop: float = 1.0
    min_area: float = 0.01
    reference_background: Background = "neutral"
    cached_latents: bool = False
    appear: float = 1.0
    augmentation: Augmentation = field(default_factory=Augmentation)

    @classmethod
    def of(cls, data: Data, size: int, reference_size: int) -> Preparation:
        """As the configuration says, for a base model and an image encoder that take squares of these sizes."""
        return cls(
            size=data.size or size,
            reference_size=reference_size,
            max_subjects=data.max_subjects,
            smallest_crop=data.smallest_crop,
            min_area=data.min_area,
            reference_background=data.background,
            cached_latents=data.cached_latents,
            appear=data.appear,
            augmentation=data.augmentation,
        )

    @property
    def latents(self) -> int | None:
        """The size whose cached latents a record must have; None where they are not read."""
        return self.size if self.cached_latents else None

    def __call__(self, record: Record, rng: np.random.Generator) -> dict[str, Tensor | str]:
        """An item, with S = max_subjects, H = W = size and R = reference_size.

        id, caption   text
        picture       [3, H, W] in -1..1
        references    [S, 3, R, R], each subject's picture as the image encoder takes it
        masks         [S, H, W], 1 where the subject is visible, 0 elsewhere
        positions     [S], the character of the caption before which the subject's noun phrase ends (its `end`)
        valid         [S] bool; the entries of the other tensors are 0 where it is False
        moments       [2, 4, size / 8, size / 8], mean and standard deviation of the latents; if they are cached
        """
        box = self._crop(record.image.size, rng)
        square = (self.size, self.size)
        # Nearest keeps ids whole; taken in the same box as the picture, so both stay aligned.
        ids = Image.fromarray(record.ids.astype(np.int32)).resize(square, Image.Resampling.NEAREST, box)
        masks = [torch.from_numpy(np.asarray(ids) == segment.id) for segment in record.segments]
        kept = self._keep(masks, record.segments)
        if self.augment:
            kept = [n for n in kept if rng.random() < self.appear]

        s, r = self.max_subjects, self.reference_size
        item = {
            "id": record.id,
            "caption": record.caption,
            "picture": as_tensor(cut(record.image, box, self.size)),
            "references": torch.zeros(s, 3, r, r),
            "masks": torch.zeros(s, self.size, self.size),
            "positions": torch.zeros(s, dtype=torch.long),
            "valid": torch.zeros(s, dtype=torch.bool),
        }
        if record.moments is not None:
            item["moments"] = record.moments
        pixels = _to_tensor(record.image)
        for slot, n in enumerate(kept):
            mask = torch.from_numpy(record.ids == record.segments[n].id).float()
            item["references"][slot] = self._reference(pixels, mask, rng)
            item["masks"][slot] = masks[n]
            item["positions"][slot] = record.segments[n].end
            item["valid"][slot] = True
        return item

    def _reference(self, pixels: Tensor, mask: Tensor, rng: np.random.Generator) -> Tensor:
        """The subject's picture [3, R, R] from pixels [H, W, 3] in 0..1, mask [H, W]."""
        chances, size = self.augmentation if self.augment else Augmentation(), self.reference_size
        if self.reference_background == "neutral" and chances == Augmentation():
            return prepare_reference(pixels, mask, size)  # to the pixel as at use
        square = on_background(pixels, mask, self.reference_background, rng, zoomed=rng.random() < chances.zoom)
        small = F.interpolate(square.movedim(-1, 0)[None], (size, size), mode="bicubic", antialias=True)[0]
        return prepare_reference(augmented(small.clamp(0, 1).movedim(0, -1), chances, rng), None, size)

    def _crop(self, size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int, int, int]:
        """left, top, right, bottom of a square inside the picture."""
        if not self.augment or self.cached_latents:
            return middle(size)
        width, height = size
        side = round(min(size) * rng.uniform(self.smallest_crop, 1))
        left, top = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
        return left, top, left + side, top + side

    def _keep(self, masks: list[Tensor], segments: list[Segment]) -> list[int]:
        """The numbers of the segments large enough to learn from, in the caption's order."""
        areas = [float(mask.float().mean()) for mask in masks]
        kept = [n for n, area in enumerate(areas) if area >= self.min_area]
        kept = sorted(kept, key=lambda n: -areas[n])[: self.max_subjects]
        return sorted(kept, key=lambda n: segments[n].end)


def middle(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """left, top, right, bottom of the largest square in the middle of a picture of this width and height."""
    width, height = size
    side = min(size)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def cut(image: Image.Image, box: tuple[int, int, int, int], size: int) -> Image.Image:
    """A square of the picture, resized."""
    return image.resize((size, size), Image.Resampling.BICUBIC, box)


def as_tensor(image: Image.Image) -> Tensor:
    """[3, H, W] in -1..1."""
    return _to_tensor(image).movedim(-1, 0) * 2 - 1


def on_background(
    pixels: Tensor, mask: Tensor, background: Background, rng: np.random.Generator, zoomed: bool = False
) -> Tensor:
    """The subject alone on a square: [H, W, 3] in 0..1, mask [H, W] -> [side, side, 3].

    zoomed: of someone taller than wide only the upper square.
    """
    rows, columns = mask.any(dim=1).nonzero().flatten(), mask.any(dim=0).nonzero().flatten()
    top, left = int(rows[0]), int(columns[0])
    cut = mask[top : int(rows[-1]) + 1, left : int(columns[-1]) + 1, None]
    cut = cut[: cut.shape[1]] if zoomed else cut
    height, width = cut.shape[:2]
    side = max(round(max(height, width) * (1 + 2 * MARGIN)), SMALLEST)
    y, x = (side - height) // 2, (side - width) // 2
    if background == "noise":
        square = torch.from_numpy(rng.random((side, side, 3), dtype=np.float32))
    else:
        colour = torch.tensor(MEAN) if background == "neutral" else torch.from_numpy(rng.random(3, dtype=np.float32))
        square = colour.repeat(side, side, 1)
    part = square[y : y + height, x : x + width]
    part.copy_(torch.lerp(part, pixels[top:, left:][:height, :width], cut))
    return square


def _to_tensor(image: Image.Image) -> Tensor:
    """[H, W, 3] in 0..1."""
    return torch.from_numpy(np.array(image)).float() / 255
