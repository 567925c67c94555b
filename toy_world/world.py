"""What exists in the toy world, and how a scene of it is drawn at random and put into words.

Identity is what the subject encoder has to carry from the reference picture; everything else is context
and named in the caption, but for the clothes, which vary freely and are neither.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import numpy as np

SKINS = ("fair", "peach", "tan", "brown", "deep")
HAIRS = ("black", "blond", "ginger", "silver", "blue", "pink")
STYLES = ("short", "long", "bob", "bun", "afro", "mohawk", "pigtails", "bald")

WORDS = ("man", "woman")
AGES = ("kid", "adult", "old")
ACTIONS = ("standing", "waving", "holding flowers", "holding a book", "riding a bike")
FRAMINGS = ("portrait", "full length")
PLACES = {
    "beach": "on a beach",
    "city": "in a city at night",
    "forest": "in a forest",
    "mountain": "on a snowy mountain",
    "room": "in a room with a sofa",
    "lavender": "in a lavender field",
}

CLOTH_COLOURS = ("red", "orange", "yellow", "green", "teal", "navy", "purple", "white")
PATTERNS = ("plain", "stripes", "dots")

HELD_OUT_SHARE = 0.1  # of all identities; they never occur in the training split


@dataclass(frozen=True)
class Identity:
    """Who someone is. Widths run from 0 (narrow) to 1 (wide)."""

    skin: str
    hair: str
    style: str
    glasses: bool
    beard: bool
    face_width: float
    body_width: float

    @property
    def held_out(self) -> bool:
        """Whether this combination of discrete attributes is kept for the test split, in every data set."""
        key = f"{self.skin} {self.hair} {self.style} {self.glasses} {self.beard}"
        first = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
        return first < HELD_OUT_SHARE * 2**32


@dataclass(frozen=True)
class Clothes:
    """What someone wears today; `top` and `bottom` are always different colours."""

    top: str
    bottom: str
    pattern: str
    long_sleeves: bool


@dataclass(frozen=True)
class Person:
    """An identity in a scene.

    x: centre of the body as a share of the picture's width; size: a factor around 1;
    facing: -1 or 1, the side towards which one looks and raises a hand;
    age_said: whether the caption names the age (always, but for some adults).
    """

    identity: Identity
    word: str
    age: str
    action: str
    clothes: Clothes
    x: float = 0.5
    size: float = 1.0
    facing: int = 1
    age_said: bool = True

    @property
    def noun_phrase(self) -> str:
        """`an old man`: ends on the word that the subject binds to."""
        phrase = f"{self.age} {self.word}" if self.age_said else self.word
        return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


@dataclass(frozen=True)
class Scene:
    """One or two people in a place; the caption names them from left to right.

    details: seed of everything that no word names, such as where the clouds are.
    """

    place: str
    framing: str
    people: tuple[Person, ...]
    details: int = 0

    @property
    def caption(self) -> str:
        """`a portrait of an old man waving and a woman holding flowers in a forest`."""
        return self._write()[0]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Characters [start, end) of each person's noun phrase in the caption."""
        return self._write()[1]

    def _write(self) -> tuple[str, list[tuple[int, int]]]:
        text = "a portrait of " if self.framing == "portrait" else ""
        spans = []
        for i, person in enumerate(self.people):
            text += " and " if i else ""
            spans.append((len(text), len(text) + len(person.noun_phrase)))
            text += f"{person.noun_phrase} {person.action}"
        return f"{text} {PLACES[self.place]}", spans

    def attributes(self) -> dict:
        """Everything that generated the picture, ready for JSON."""
        return asdict(self)


def _pick(rng: np.random.Generator, values):
    return values[int(rng.integers(len(values)))]


def _chance(rng: np.random.Generator, share: float) -> bool:
    return bool(rng.random() < share)


def _styles(word: str, age: str) -> list[str]:
    without = {"man": {"pigtails"}, "woman": {"bald"}}[word] | ({"bald"} if age == "kid" else set())
    return [style for style in STYLES if style not in without]


def sample_identity(rng: np.random.Generator, word: str, age: str, held_out: bool = False) -> Identity:
    """Someone who may be called so, from the held-out identities or from all the others."""
    styles = _styles(word, age)
    while True:
        identity = Identity(
            skin=_pick(rng, SKINS),
            hair=_pick(rng, HAIRS),
            style=_pick(rng, styles),
            glasses=_chance(rng, 0.4),
            beard=_chance(rng, 0.5) and word == "man" and age != "kid",
            face_width=round(float(rng.random()), 3),
            body_width=round(float(rng.random()), 3),
        )
        if identity.held_out == held_out:
            return identity


@lru_cache
def _strangers(word: str) -> tuple[Identity, ...]:
    """Every held-out adult who goes by that word, in a random order that is always the same."""
    beards = (False, True) if word == "man" else (False,)
    kinds = itertools.product(SKINS, HAIRS, _styles(word, "adult"), (False, True), beards)
    people = [Identity(*kind, face_width=0.5, body_width=0.5) for kind in kinds]
    people = [people[n] for n in np.random.default_rng(0).permutation(len(people))]
    return tuple(identity for identity in people if identity.held_out)


def someone(seed: int, word: str) -> Identity:
    """An adult who goes by that word and whom no model was trained on; the next seed is somebody else."""
    strangers, rng = _strangers(word), np.random.default_rng(seed)
    face, body = (round(float(width), 3) for width in rng.random(2))
    return replace(strangers[seed % len(strangers)], face_width=face, body_width=body)


def sample_clothes(rng: np.random.Generator) -> Clothes:
    top, bottom = rng.permutation(CLOTH_COLOURS)[:2]
    return Clothes(str(top), str(bottom), _pick(rng, PATTERNS), _chance(rng, 0.5))


def sample_person(rng: np.random.Generator, held_out: bool = False) -> Person:
    """Someone in the middle of the picture."""
    word, age = _pick(rng, WORDS), _pick(rng, AGES)
    return Person(
        identity=sample_identity(rng, word, age, held_out),
        word=word,
        age=age,
        action=_pick(rng, ACTIONS),
        clothes=sample_clothes(rng),
        x=0.5 + 0.1 * float(rng.uniform(-1, 1)),
        size=float(rng.uniform(0.96, 1.04)),
        facing=_pick(rng, (-1, 1)),
        age_said=age != "adult" or _chance(rng, 0.5),
    )


def sample_scene(rng: np.random.Generator, held_out: bool = False) -> Scene:
    """A scene with one or two people, all of them held out or none."""
    people = tuple(sample_person(rng, held_out) for _ in range(_pick(rng, (1, 2))))
    if len(people) == 2:
        people = tuple(side_by_side(people))
    # A bike does not fit into a portrait.
    riding = any(person.action == "riding a bike" for person in people)
    framing = "portrait" if not riding and _chance(rng, 0.6) else "full length"
    return Scene(_pick(rng, tuple(PLACES)), framing, people, details=int(rng.integers(2**31)))


def side_by_side(people: tuple[Person, Person]) -> list[Person]:
    """Moves two people to the left and the right half, raising their hands on the free side."""
    left, right = people
    return [
        replace(left, x=0.265 + (left.x - 0.5) / 5, facing=-1),
        replace(right, x=0.735 + (right.x - 0.5) / 5, facing=1),
    ]
