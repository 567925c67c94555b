"""Judges of pictures of the toy world: who is in them, what they do, where, and which pixels are people.

Trained on renders alone, never on samples, and never seen by the training of base model or MoA.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moa_core.files.whole_file import whole
from training.toy.renders import ATTRIBUTES, Renders, to_tensor

JUDGES = Path(__file__).with_name("judges.safetensors")
"""The trained judges, the same for everyone."""
SIDE = 128
"""They look at pictures of this size, whatever the base model's."""


class Classifier(nn.Module):
    """A small CNN with a head for every attribute of identity and context."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *_down(3, 16), *_down(16, 32), *_down(32, 64), *_down(64, 128), *_down(128, 128), nn.Flatten(),
            nn.Dropout(0.2), nn.Linear(128 * (SIDE // 32) ** 2, 128), nn.ReLU(),
        )  # fmt: skip
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(values)) for name, values in ATTRIBUTES.items()})

    def forward(self, views: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] in -1..1 -> logits [B, values] of every attribute."""
        x = self.trunk(views)
        return {name: head(x) for name, head in self.heads.items()}


class Segmenter(nn.Module):
    """Which pixels are people, by what is around them at four scales."""

    WIDTHS = (8, 24, 48, 64)

    def __init__(self) -> None:
        super().__init__()
        before = (3, *self.WIDTHS)
        self.down = nn.ModuleList(nn.Sequential(*_down(a, b)) for a, b in zip(before, self.WIDTHS, strict=False))
        self.up = nn.ModuleList(_convolution(a + b, a) for a, b in zip(self.WIDTHS, self.WIDTHS[1:], strict=False))
        self.out = nn.Conv2d(self.WIDTHS[0], 1, 3, padding=1)

    def forward(self, pictures: Tensor) -> Tensor:
        """[B, 3, H, W] in -1..1 -> logits [B, H, W]."""
        levels = []
        for down in self.down:
            levels.append(down(levels[-1] if levels else pictures))
        x = levels[-1]
        for up, level in reversed(list(zip(self.up, levels[:-1], strict=True))):
            x = up(torch.cat([level, F.interpolate(x, scale_factor=2)], dim=1))
        return F.interpolate(self.out(x), scale_factor=2, mode="bilinear")[:, 0]


def _convolution(before: int, after: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU())


def _down(before: int, after: int) -> nn.Sequential:
    return _convolution(before, after, stride=2)


class Readout(nn.Module):
    """All judges."""

    def __init__(self) -> None:
        super().__init__()
        self.attributes, self.person = Classifier(), Segmenter()
        self.to(memory_format=torch.channels_last)

    def save(self, path: Path) -> None:
        """As float16, whole or not at all."""
        weights = {k: v.cpu().half() if v.is_floating_point() else v.cpu() for k, v in self.state_dict().items()}
        with whole(path) as unfinished:
            save_file({name: weight.contiguous() for name, weight in weights.items()}, unfinished)

    @classmethod
    def load(cls, path: Path = JUDGES) -> Readout:
        """Raises ValueError for a file that holds no judges."""
        readout = cls()
        try:
            readout.load_state_dict(load_file(path))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ValueError(f"{path} holds no judges ({error}); train them: make toy-judges") from error
        return readout.eval()

    def forward(self, views: Tensor) -> dict[str, Tensor]:
        """Views [B, 3, H, W] -> logits [B, values] of every attribute."""
        return self.attributes(_resize(views, SIDE))

    def person_logits(self, pictures: Tensor) -> Tensor:
        """[B, 3, H, W] in -1..1 -> [B, H, W], above 0 on people, but not on what they hold or ride."""
        logits = self.person(_resize(pictures, SIDE))
        return _resize(logits[:, None], pictures.shape[-1])[:, 0]

    @torch.no_grad()
    def people(self, pictures: Tensor) -> Tensor:
        """[B, 3, H, W] in -1..1 -> bool [B, H, W], True on people."""
        return self.person_logits(pictures) > 0


def _resize(x: Tensor, side: int) -> Tensor:
    """[B, C, H, W] -> [B, C, side, side]."""
    return x if x.shape[-1] == side else F.interpolate(x, (side, side), mode="bilinear", antialias=True)


@torch.no_grad()
def accuracy(readout: Readout, renders: Renders) -> dict[str, float]:
    """Share of right answers per head, and how well people's pixels are found (intersection over union)."""
    where = next(readout.parameters()).device
    right = {name: 0 for name in renders.labels}
    for who in torch.arange(len(renders.scene)).split(128):
        for name, logits in readout(renders.views(who).to(where)).items():
            right[name] += int((logits.argmax(dim=1).cpu() == renders.labels[name][who]).sum())
    found = torch.cat([readout.people(to_tensor(part).to(where)).cpu() for part in np.array_split(renders.pixels, 8)])
    people = torch.from_numpy(renders.people)
    overlap = float((found & people).sum() / (found | people).sum())
    return {name: count / len(renders.scene) for name, count in right.items()} | {"people": overlap}
