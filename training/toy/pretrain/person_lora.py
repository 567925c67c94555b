"""A LoRA of one person of the toy world, as people make them of a friend: some pictures, five minutes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from toy_world.draw import draw_scene
from toy_world.shape import IMAGE_SIZE
from toy_world.world import ACTIONS, FRAMINGS, PLACES, Person, Scene, sample_person, someone
from training.toy.pretrain.loop import Plan, base_of
from training.toy.pretrain.lora import LoRADenoiser, save_lora
from training.toy.pretrain.on_base import HELD_OUT, Scenes, train_on_base
from training.toy.pretrain.unet import DROPPED

RANK = 8
LAYERS = ("to_", "proj_", "ff.net")
"""Attention and feed-forward, as kohya's trainer does unless told otherwise."""
PICTURES = 320
GAMMA = 0.3
"""Of the min-SNR weighting: hair is decided in strong noise, which the base model's own weighting counts least."""


def train_person_lora(plan: Plan, word: str, person: int) -> None:
    """Train a LoRA of `someone(person, word)` on the base model; the file is `<word>-<person>.safetensors`."""
    base, scenes = base_of(plan), [_scene(plan.seed, n, word, person) for n in range(PICTURES + HELD_OUT)]
    plan.run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(plan.seed)
    pixels = np.stack([np.asarray(draw_scene(scene, IMAGE_SIZE)[0]) for scene in scenes])
    learnt = Scenes.of(base, torch.from_numpy(pixels), [scene.caption for scene in scenes])
    model, name = LoRADenoiser(base, RANK, LAYERS), f"{word}-{person}"
    prompts = [f"a {word} {ACTIONS[n % 4]} {place}" for n, place in enumerate(PLACES.values())]
    train_on_base(plan, f"lora-{name}", base, model, learnt, DROPPED, prompts, GAMMA)
    save_lora(model.unet, plan.run / f"{name}.safetensors")


def _scene(seed: int, number: int, word: str, person: int) -> Scene:
    """The person alone, somewhere, doing something; the caption calls them by their word."""
    rng = np.random.default_rng([seed, number])
    anyone = sample_person(rng)
    shown: Person = replace(anyone, identity=someone(person, word), word=word, age="adult", age_said=False)
    riding = shown.action == "riding a bike"
    framing = "full length" if riding else FRAMINGS[int(rng.random() < 0.4)]
    return Scene(tuple(PLACES)[number % len(PLACES)], framing, (shown,), details=int(rng.integers(2**31)))
