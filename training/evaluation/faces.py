"""Whose faces a picture shows: MTCNN finds them, FaceNet tells them apart, as in FastComposer's evaluation."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from training.data.pairing import pair_up

SMALLEST = 20
"""Pixels; MTCNN looks for no smaller face."""


class FaceJudge:
    """MTCNN with the weights that come in its package, and an InceptionResnetV1 from a .safetensors file."""

    def __init__(self, weights: Path, device: torch.device):
        """Raises ValueError for a file that does not hold the network."""
        from facenet_pytorch import MTCNN, InceptionResnetV1  # here, so that only an evaluation needs the package

        self.device = device
        self.detector = MTCNN(min_face_size=SMALLEST, keep_all=True, device=device)
        self.network = InceptionResnetV1().to(device).eval().requires_grad_(False)
        self.network.load_state_dict(_read(weights, self.network.state_dict()))

    @torch.no_grad()
    def faces(self, picture: Image.Image) -> Tensor:
        """Unit vectors [F, 512] of the faces in an RGB picture, the largest first; none: [0, 512]."""
        crops = self.detector(picture) if min(picture.size) >= SMALLEST else None  # [F, 3, 160, 160]
        return torch.empty(0, 512) if crops is None else self.network(crops.to(self.device)).cpu()

    def reference(self, pictures: dict[Path, Image.Image]) -> Tensor:
        """A person's unit vector [512]: the mean over the largest face of each picture.

        Raises ValueError for a picture without a face.
        """
        found = {path: self.faces(picture) for path, picture in pictures.items()}
        for path, faces in found.items():
            if len(faces) == 0:
                raise ValueError(f"{path} shows no face that MTCNN finds: replace it, or remove it from the subject")
        mean = torch.stack([faces[0] for faces in found.values()]).mean(dim=0)
        return mean / mean.norm()


def identity_preservation(faces: Tensor, references: Tensor) -> float:
    """How well a picture's faces [F, E], the largest first, keep its subjects' references [S, E]; unit vectors.

    The S largest faces are matched to the references, the surest pair first. Of the S cosine similarities
    the smallest counts; 0 where it is negative or a face is missing.
    """
    if len(faces) < len(references):
        return 0.0
    scores = references @ faces[: len(references)].T  # [S, S]
    return max(0.0, min(float(scores[pair]) for pair in pair_up(scores)))


def _read(path: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights the network needs; the published file's classifier (`logits`) is not among them."""
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"--facenet: {path} cannot be read as a .safetensors file ({error}); "
            "see the top of training/evaluation/paper.py for how to make it"
        ) from error
    wrong = [name for name, weight in expected.items() if name not in weights or weights[name].shape != weight.shape]
    if wrong:
        raise ValueError(
            f"--facenet: {path} does not hold an InceptionResnetV1: {len(wrong)} of its {len(expected)} weights are "
            f"missing or of another shape, such as {wrong[0]}; see the top of training/evaluation/paper.py"
        )
    return {name: weights[name] for name in expected}
