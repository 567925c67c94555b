"""What the judges of the toy world say of a workflow's pictures, asked about the people whom it draws."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from toy_world.world import Identity, someone
from training.comfyui.templates import read
from training.toy.judges import Readout
from training.toy.renders import ATTRIBUTES, IDENTITY, to_tensor, views

KEPT = ("skin", "hair", "glasses")
"""What the shipped MoA carries over best; a hair style in a third of the pictures."""
readout = cache(Readout.load)


def people(name: str) -> dict[str, Identity]:
    """Whom the Toy Subjects of a workflow draw, by the last word of their titles."""
    toys = [node for node in read(name)["nodes"] if node["type"] == "MoAToySubject"]
    drawn = {node.get("title", "Subject").split()[-1]: node["widgets_values_named"] for node in toys}
    return {title: someone(w["seed"], w["word"]) for title, w in drawn.items() if not w["skeleton"]}


def by_loras(name: str) -> list[Identity]:
    """Whom the LoRA Subjects of a workflow were trained on, in the order of its nodes."""
    subjects = [node for node in read(name)["nodes"] if node["type"] == "MoALoRASubject"]
    files = [Path(node["widgets_values_named"]["lora_name"]).stem for node in subjects]
    return [someone(int(person), word) for word, person in (file.split("-")[-2:] for file in files)]


def pixels(image: Image.Image) -> np.ndarray:
    """[H, W, 3] from 0 to 1."""
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255


def change(a: Image.Image, b: Image.Image) -> np.ndarray:
    """[H, W], of a range of 1."""
    return np.abs(pixels(a) - pixels(b)).mean(axis=2)


def peak_signal_to_noise(a: Image.Image, b: Image.Image) -> float:
    """In dB."""
    return float(-10 * np.log10(np.square(pixels(a) - pixels(b)).mean()))


@torch.no_grad()
def look(pictures: Iterable[Image.Image], count: int = 1) -> list[dict[str, Tensor]]:
    """For each of the people in every picture, from left to right: log probabilities [B, values] of each attribute."""
    batch = to_tensor(np.stack([np.asarray(picture.convert("RGB")) for picture in pictures]))
    seen = [readout()(view) for view in views(batch, count)]
    return [{name: logits.log_softmax(dim=1) for name, logits in one.items()} for one in seen]


def read_off(pictures: Iterable[Image.Image], attribute: str, count: int = 1) -> list:
    """What the judges see in the pictures, looking at the first person of each."""
    return [ATTRIBUTES[attribute][n] for n in look(pictures, count)[0][attribute].argmax(dim=1).tolist()]


def likelihood(seen: dict[str, Tensor], who: Identity, attributes: Sequence[str] = tuple(IDENTITY)) -> Tensor:
    """[B]: log probability of being that person."""
    known = vars(who)
    return sum(seen[name][:, IDENTITY[name].index(known[name])] for name in attributes)


def cast(picture: Image.Image, candidates: dict[str, Identity], count: int = 2) -> list[str]:
    """Who of the candidates each person of a picture most likely is, from left to right."""
    return [
        max(candidates, key=lambda name: float(likelihood(seen, candidates[name]))) for seen in look([picture], count)
    ]


def people_in(*pictures: Image.Image) -> np.ndarray:
    """Where a person is in any of the pictures, bool [H, W]."""
    batch = to_tensor(np.stack([np.asarray(picture.convert("RGB")) for picture in pictures]))
    return readout().people(batch).any(dim=0).numpy()
