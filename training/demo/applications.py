"""What the shared workflows show, as diffusers samples it: the pictures that each saves, by their nodes' titles.

ComfyUI runs the workflows themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from training.demo.takes import ALONE, PRIOR, TOGETHER, WITH_A, WITH_B, A, B, Take, W, Who

STICKERS = "moa-toy-sticker.safetensors"


@dataclass(frozen=True)
class ByLoRA:
    """A person who has a LoRA file, as LoRA Subject takes it; they may be among a shot's people."""

    word: str
    person: int
    """Whom it was trained on: a seed of Toy Subject."""

    @property
    def file(self) -> str:
        return f"moa-toy-{self.word}-{self.person}.safetensors"


@dataclass(frozen=True)
class Shot(Take):
    """A take, and what a workflow has beside MoA.

    toward: another prompt, and its share in the conditioning. photo: the shot begins from this one's picture, inverted.
    loras: files in all of the base model. pose: who stands how, for the pose ControlNet.
    """

    toward: tuple[str, float] | None = None
    photo: Take | None = None
    loras: tuple[str, ...] = ()
    pose: tuple[Who, str] | None = None


C, D, MAN, WOMAN = Who(21, "man"), Who(2, "man"), B, Who(1, "woman")
COUPLE = ("a portrait of a man waving and a man standing on a beach", 5)
FACES = ("a portrait of a man holding a book in a forest", 9)
SHAPES = {"Prior": ((Who(2697, "man"),), 0.0), "Wide": ((Who(2697, "man"),),), "Narrow": ((Who(1329, "man"),),)}
HANDS_FULL = "a portrait of a man holding a book and a woman holding flowers in a lavender field"
STORY = (
    "a portrait of a man waving and a woman standing on a beach",
    "a portrait of a man holding a book and a woman holding flowers in a forest",
    "a portrait of a man standing and a woman waving in a city at night",
    "a portrait of a man holding flowers and a woman holding a book on a snowy mountain",
)
POSED = ("a portrait of a man on a beach", 5)
STICKER = ("a portrait of a man holding a book in a forest", 3)
KID, OLD = (f"a portrait of {age} man holding a book in a forest" for age in ("a kid", "an old"))
BLUE, BLOND, PINK = ByLoRA("man", 18), ByLoRA("man", 8), ByLoRA("woman", 10)
BOTH_LORAS = (HANDS_FULL, 5)
WITH_PHOTO = ("a portrait of a man standing and a woman holding flowers in a forest", 5)
TWO_MEN = ("a portrait of a man waving and a man standing in a forest", 4)
ON_A_BEACH = ("a portrait of a man waving on a beach", 14)
PHOTO = Take(*ON_A_BEACH, ())


def _aged(share: float) -> list[Shot]:
    return [Shot(KID, 10, (MAN,), toward=(OLD, share))]


APPLICATIONS: dict[str, dict[str, Sequence[Take]]] = {
    "One person": {"Picture": [WITH_A]},
    "Swap the person": {"Prior": [PRIOR], "Subject A": [WITH_A], "Subject B": [WITH_B]},
    "Two people": {"Picture": [TOGETHER]},
    "Face shapes": {title: [Take(*FACES, *who)] for title, who in SHAPES.items()},
    "Swap one of two": {"A and B": [Take(*COUPLE, (A, C))], "C for A": [Take(*COUPLE, (D, C))]},
    "Exchange two people": {"A and B": [Take(*COUPLE, (A, C))], "B and A": [Take(*COUPLE, (C, A))]},
    "Four layouts of one couple": {"Four layouts": [Take(HANDS_FULL, 2, (MAN, WOMAN), frames=4)]},
    "Morph": {
        "Between A and B": [Take(*ALONE, (A,), morph=B)],
        "Animation": [Take(*ALONE, (A,), morph=B, frames=8)],
    },
    "Swap a person in a photo": {
        "The photo": [PHOTO],
        "Swapped": [Shot(*ON_A_BEACH, (Who(5, "man"),), photo=PHOTO)],
    },
    "Time lapse": {
        "Kid": _aged(0),
        "A third older": _aged(0.35),
        "Two thirds older": _aged(0.65),
        "Old": _aged(1),
    },
    "Pose control": {"Picture": [Shot(*POSED, (A,), pose=(Who(5, "man"), "waving"))]},
    "Another style": {
        "Style, no subject": [Shot(*STICKER, (A,), 0.0, loras=(STICKERS,))],
        "Subject": [Shot(*STICKER, (A,))],
        "Subject in the style": [Shot(*STICKER, (A,), loras=(STICKERS,))],
    },
    "Two LoRAs, two people": {
        "No LoRA": [Take(*BOTH_LORAS, ())],
        "Both LoRAs loaded": [Shot(*BOTH_LORAS, (), loras=(BLUE.file, PINK.file))],
        "As LoRA subjects": [Take(*BOTH_LORAS, (BLUE, PINK))],
    },
    "A LoRA and a photo": {"Picture": [Take(*WITH_PHOTO, (BLUE, W))]},
    "Two of one word": {"Picture": [Take(*TWO_MEN, (BLUE, BLOND))]},
    "Story": {"Story": [Take(prompt, 0, (MAN, WOMAN)) for prompt in STORY]},
}
NOT_ONE_CALL = {
    "Check my files": "it is there for MoA Report, a node of ComfyUI",
    "Other clothes, other place": "its second pass paints within a mask",
    "Swap the second of two in a photo": "the first of the two comes back by a mask",
}
"""What the pipeline in diffusers does not do in one call; in ComfyUI these are graphs like the others."""
