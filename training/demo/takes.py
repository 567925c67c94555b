"""What the demo samples, and of whom."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from toy_world.draw import draw_person
from toy_world.world import someone

CHECKPOINT, MOA = "moa-toy-base.safetensors", "moa-toy.safetensors"
STEPS, CFG = 20, 2.5


@dataclass(frozen=True)
class Who:
    """A reference person, as Toy Subject draws them."""

    seed: int
    word: str

    def picture(self) -> tuple[Image.Image, np.ndarray]:
        """The reference and the person's mask."""
        return draw_person(someone(self.seed, self.word), self.word)


@dataclass(frozen=True)
class Take:
    """One sampling. people bind to their words; strength 0 is the prior.

    morph: the one person becomes another, frame by frame from the same noise; alone, a frame is halfway.
    """

    prompt: str
    seed: int
    people: tuple[Who, ...]
    strength: float = 1.0
    morph: Who | None = None
    frames: int = 1


A, B, W = Who(1, "man"), Who(8, "man"), Who(13, "woman")
ALONE = ("a portrait of a man holding flowers in a lavender field", 0)
PRIOR, WITH_A, WITH_B = Take(*ALONE, (A,), 0.0), Take(*ALONE, (A,)), Take(*ALONE, (B,))
TOGETHER = Take("a portrait of a man standing and a woman holding flowers in a forest", 23, (A, W))
MORPH = Take(*ALONE, (A,), morph=B, frames=6)
