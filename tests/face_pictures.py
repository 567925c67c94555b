"""Photos with faces, and who finds them: an object with the interface of insightface, which has no models here.

A face is a square of pure red and of a green that no other face has.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moa_core.subjects.face_crop import POINTS

LARGEST = 0.6
"""Of the picture's longer side: the detector does not see what is larger."""


@dataclass
class FoundFace:
    bbox: np.ndarray
    kps: np.ndarray
    embedding: np.ndarray

    @property
    def normed_embedding(self) -> np.ndarray:
        return self.embedding / np.linalg.norm(self.embedding)


class FaceFinder:
    """Of a picture [H, W, 3] of bytes in blue, green, red: its faces, the first painted first."""

    def get(self, picture: np.ndarray) -> list[FoundFace]:
        blue, green, red = picture[..., 0], picture[..., 1], picture[..., 2]
        known = sorted(set(green[(red == 255) & (blue == 0)].tolist()))
        found = [self._face((red == 255) & (blue == 0) & (green == who), who) for who in known]
        most = LARGEST * max(picture.shape)
        return [face for face in found if face.bbox[2] - face.bbox[0] <= most]

    def _face(self, place: np.ndarray, who: int) -> FoundFace:
        rows, columns = np.where(place)
        box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], dtype=np.float32)
        points = box[:2] + np.array(POINTS, dtype=np.float32) / 112 * (box[2] - box[0])
        return FoundFace(box, points, embedding(who))


def embedding(who: int) -> np.ndarray:
    """Of the face of that green: as long as insightface's are, 20 or so."""
    return np.random.default_rng(who).standard_normal(512).astype(np.float32)


def photo(*people: tuple[int, int, int, int], size: tuple[int, int] = (96, 128)) -> Tensor:
    """[1, H, W, 3] in 0..1 with faces (who, left, top, side)."""
    picture = torch.full((1, *size, 3), 0.3)
    for who, left, top, side in people:
        picture[0, top : top + side, left : left + side] = torch.tensor([1.0, who / 255, 0.0])
    return picture
