"""Renders of the toy world with the right answers about them: what the judges learn from, and are checked on.

A person is looked at in their own view: the whole picture of one person, the left or right half of a picture of two.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from toy_world.draw import draw_scene
from toy_world.shape import IMAGE_SIZE
from toy_world.world import ACTIONS, AGES, HAIRS, PLACES, SKINS, STYLES, Person, Scene, sample_scene

NO_YES = (False, True)
IDENTITY = {"skin": SKINS, "hair": HAIRS, "style": STYLES, "glasses": NO_YES, "beard": NO_YES}
CONTEXT = {"scene": tuple(PLACES), "action": ACTIONS, "age": AGES}
ATTRIBUTES = IDENTITY | CONTEXT
TRAIN, TEST = 1, 2
"""Random streams of the renders, apart from those of the base model's pictures."""
TEST_SCENES = 400


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> [B, 3, H, W] in -1..1, channels last."""
    return torch.from_numpy(np.array(pixels)).movedim(-1, 1).float() / 127.5 - 1


def views(pictures: Tensor, people: int) -> list[Tensor]:
    """Pictures [B, 3, H, W] -> for each person, from left to right, their view [B, 3, H, W] between grey margins."""
    if people == 1:
        return [pictures]
    half = pictures.shape[-1] // 2
    return [F.pad(side, (half // 2, half // 2)) for side in pictures.split(half, dim=-1)]


def labels(scene: Scene, person: Person) -> dict[str, int]:
    """The right answer of every head, as a number."""
    known = vars(person.identity) | {"scene": scene.place, "action": person.action, "age": person.age}
    return {name: values.index(known[name]) for name, values in ATTRIBUTES.items()}


@dataclass(frozen=True)
class Renders:
    """N scenes of M people: pixels uint8 [N, H, W, 3], people bool [N, H, W], labels [M] and the owner's scene [M]."""

    pixels: np.ndarray
    people: np.ndarray
    scene: Tensor
    """[M]: the number of each person's picture."""
    place: Tensor
    """[M, 2]: which person of how many."""
    labels: dict[str, Tensor]

    def views(self, who: Tensor) -> Tensor:
        """[K] numbers of people -> their views [K, 3, H, W]."""
        pictures = to_tensor(self.pixels[self.scene[who].numpy()])
        place = self.place[who].tolist()
        return torch.cat([views(p[None], count)[side] for p, (side, count) in zip(pictures, place, strict=True)])


def draw_renders(seed: int, stream: int, count: int, workers: int = 1) -> Renders:
    """Scenes for one split; those of the test split show people that no training has seen."""
    with ProcessPoolExecutor(workers) as pool:
        drawn = list(pool.map(partial(_draw, seed, stream), range(count), chunksize=64))
    pictures, masks, scenes = zip(*drawn, strict=True)
    everyone = [(n, i, scene) for n, scene in enumerate(scenes) for i in range(len(scene.people))]
    answers = [labels(scene, scene.people[i]) for _, i, scene in everyone]
    return Renders(
        np.stack(pictures),
        np.stack(masks),
        torch.tensor([n for n, _, _ in everyone]),
        torch.tensor([(i, len(scene.people)) for _, i, scene in everyone]),
        {name: torch.tensor([answer[name] for answer in answers]) for name in answers[0]},
    )


def _draw(seed: int, stream: int, index: int) -> tuple[np.ndarray, np.ndarray, Scene]:
    scene = sample_scene(np.random.default_rng([seed, stream, index]), held_out=stream == TEST)
    image, ids = draw_scene(scene, IMAGE_SIZE)
    return np.asarray(image), ids > 0, scene
