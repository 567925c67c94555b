"""The prompts of an evaluation in the toy world, the people in them, and how they are drawn.

Every prompt is drawn by the prior and with people that no training has seen, and again with the references exchanged:
one person's for another's, or the two people's of a picture for each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from moa_core.run import Call
from moa_core.subjects.subject import Subject
from toy_world.draw import draw_person
from toy_world.world import (
    ACTIONS,
    AGES,
    FRAMINGS,
    PLACES,
    WORDS,
    Identity,
    Person,
    Scene,
    sample_clothes,
    sample_identity,
)
from training.host.pipeline import MoAPipeline

STEPS, CFG = 12, 4.0
SINGLES, PAIRS = 30, 10
PER_PROMPT = 3


@dataclass(frozen=True)
class Case:
    """One prompt, drawn as often as there are rows of references; references[i]: those of the i-th person."""

    scene: Scene
    references: list[list[Identity]]
    seed: int

    def exchanged(self) -> Case:
        """The same prompt and noise with other people: the next row's, or the other person's."""
        if len(self.references) == 2:
            return replace(self, references=self.references[::-1])
        return replace(self, references=[rows[1:] + rows[:1] for rows in self.references])


def cases(singles: int = SINGLES, pairs: int = PAIRS) -> Iterator[Case]:
    """The prompts: every place with every action, and pairs of any two words."""
    for n in range(singles):
        rng = np.random.default_rng([n, 1])
        person = _person(rng, ACTIONS[n % 5], AGES[n % 3] if n % 4 else "adult", WORDS[(n // 2) % 2])
        people = [sample_identity(rng, person.word, person.age, held_out=True) for _ in range(PER_PROMPT)]
        yield Case(_scene(n, (person,)), [people], seed=n)
    for n in range(pairs):
        rng = np.random.default_rng([n, 2])
        people = tuple(_person(rng, ACTIONS[(n + i) % 4], "adult", WORDS[(n >> i) % 2]) for i in range(2))
        rows = [_two_unlike(rng) for _ in range(PER_PROMPT)]
        yield Case(_scene(n, people), [list(column) for column in zip(*rows, strict=True)], seed=100 + n)


def _person(rng: np.random.Generator, action: str, age: str, word: str) -> Person:
    nobody = sample_identity(rng, word, age)
    return Person(nobody, word, age, action, sample_clothes(rng), age_said=age != "adult")


def _scene(n: int, people: tuple[Person, ...]) -> Scene:
    riding = any(person.action == "riding a bike" for person in people)
    return Scene(tuple(PLACES)[n % 6], "full length" if riding else FRAMINGS[n % 2], people)


def _two_unlike(rng: np.random.Generator) -> tuple[Identity, Identity]:
    """Two people who may go by either word, of other skin and other hair."""
    while True:
        a, b = (sample_identity(rng, "woman", "adult", held_out=True) for _ in range(2))
        if a.skin != b.skin and a.hair != b.hair and "pigtails" not in (a.style, b.style):
            return a, b


@dataclass(frozen=True)
class Drawn:
    """pictures [B, 3, H, W] in -1..1, and the routers' shares [B, h, w] (None for the prior)."""

    pictures: Tensor
    area: Tensor | None
    asked: float | None
    """Part of all layers' pixels that went through the expert, in the steps that sparse routing cut (None: none)."""
    calls: int
    """U-Net calls, each with and without the prompt, that sampled every picture."""


def draw(
    pipeline: MoAPipeline, case: Case, strength: float = 1.0, subject_cfg: float | None = None, sparse: bool = True
) -> Drawn:
    """strength 0 is the prior, which no reference reaches; subject_cfg, sparse: see MoAPipeline."""
    cut: list[float] = []

    def watch(call: Call) -> None:
        learned = call.learned
        if learned is not None and 0 < learned.asked < learned.pixels:
            cut.append(learned.asked / learned.pixels)

    options = {"steps": STEPS, "cfg": CFG, "strength": strength, "batch": PER_PROMPT, "subject_cfg": subject_cfg}
    calls: list[int] = []
    counter = pipeline.base.unet.register_forward_hook(lambda *call: calls.append(1))
    pictures, trace = pipeline(
        case.scene.caption, subjects_of(pipeline, case), seed=case.seed, sparse=sparse, watch=watch, **options
    )
    counter.remove()
    area = trace.subject_area() if trace else None
    return Drawn(pictures.movedim(-1, 1) * 2 - 1, area, float(np.mean(cut)) if cut else None, len(calls))


def subjects_of(pipeline: MoAPipeline, case: Case) -> list[Subject]:
    """A subject for each person of the scene; its variants are the pictures'."""
    subjects = []
    for person, identities in zip(case.scene.people, case.references, strict=True):
        references = [reference(pipeline, identity, person.word) for identity in identities]
        subjects.append(Subject(torch.cat([r.features for r in references]), person.word, person.word))
    return subjects


def reference(pipeline: MoAPipeline, identity: Identity, word: str) -> Subject:
    """Someone as a user would show them: a portrait of an adult before nothing, whatever the prompt says."""
    image, mask = draw_person(identity, word)
    pixels = torch.from_numpy(np.array(image)).float() / 255
    return pipeline.encode_subject(pixels[None], word, torch.from_numpy(mask).float()[None])
