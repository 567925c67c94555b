"""From a scene of the toy world to its picture and masks; needs nothing but numpy and Pillow."""

from __future__ import annotations

import numpy as np
from PIL import Image

from .pen import GRID, Canvas, Colour, Pen
from .people import Build, draw_person_at, joints_of_arms, joints_of_legs
from .scenes import SHADOWS, draw_place
from .shape import IMAGE_SIZE
from .world import Clothes, Identity, Person, Scene

NEUTRAL: Colour = (122, 116, 104)
CLOTHES = Clothes("teal", "navy", "plain", True)
GROUND = 120.0


def draw_scene(scene: Scene, size: int = IMAGE_SIZE) -> tuple[Image.Image, np.ndarray]:
    """The picture, RGB size x size, and the map uint8 [size, size]: 0 background, n the n-th person.

    A person's segment is what is visible of body and clothes; what they hold or ride is background.
    """
    canvas = Canvas(size)
    draw_place(canvas, scene.place, scene.details)
    for number, person in enumerate(scene.people, start=1):
        pen = _stand(canvas, person, scene.framing, alone=len(scene.people) == 1)
        if scene.framing == "full length":
            width = pen.unit * (1.9 if person.action == "riding a bike" else 1.2)
            Pen(canvas).ellipse(pen.x, GROUND, width, 3.2, SHADOWS[scene.place])
        pen.segment = number
        draw_person_at(pen, person)
    return canvas.finish()


def draw_person(
    identity: Identity,
    word: str = "man",
    age: str = "adult",
    action: str = "standing",
    framing: str = "portrait",
    clothes: Clothes | None = None,
    size: int = IMAGE_SIZE,
    background: Colour = NEUTRAL,
) -> tuple[Image.Image, np.ndarray]:
    """A reference picture: one person before a plain background, and who is where, bool [size, size]."""
    person = Person(identity, word, age, action, clothes or CLOTHES)
    canvas = Canvas(size, background)
    pen = _stand(canvas, person, framing, alone=True)
    pen.segment = 1
    draw_person_at(pen, person)
    image, ids = canvas.finish()
    return image, ids == 1


BONES: dict[str, Colour] = {
    "body": (255, 255, 255),
    "head": (255, 220, 0),
    "arm": (255, 60, 60),
    "other arm": (255, 150, 0),
    "leg": (0, 160, 255),
    "other leg": (0, 255, 120),
}


def draw_pose(scene: Scene, size: int = IMAGE_SIZE) -> Image.Image:
    """How its people stand, as a skeleton on black, RGB size x size: what a pose ControlNet is shown."""
    canvas = Canvas(size)
    for person in scene.people:
        pen, build = _stand(canvas, person, scene.framing, alone=len(scene.people) == 1), Build.of(person)
        legs, (behind, front) = joints_of_legs(person, build), joints_of_arms(person, build)
        pen.line([(0, 0), (0, build.hip)], 0.16, BONES["body"])
        for name, joints in zip(("leg", "other leg", "arm", "other arm"), [*legs, *front, *behind], strict=False):
            pen.line([(0, build.hip) if "leg" in name else (0, 0), *joints], 0.16, BONES[name])
        pen.line([(0, 0), build.head], 0.16, BONES["head"])
        pen.circle(*build.head, 0.3, BONES["head"])
    return canvas.finish()[0]


def draw_person_pose(
    identity: Identity, word: str = "man", action: str = "standing", framing: str = "portrait", size: int = IMAGE_SIZE
) -> Image.Image:
    """How the adult of a reference picture stands, as a skeleton on black."""
    person = Person(identity, word, "adult", action, CLOTHES)
    return draw_pose(Scene("room", framing, (person,)), size)  # a pose has no place


def _stand(canvas: Canvas, person: Person, framing: str, alone: bool) -> Pen:
    """A pen at the person's neck, in the size that suits the framing."""
    build = Build.of(person)
    if framing == "portrait":
        unit = (29 if alone else 22) * person.size * (0.95 if person.age == "kid" else 1)
        neck = GRID - unit * {"kid": 1.2, "adult": 1.35, "old": 1.3}[person.age]
    else:
        unit = (21.5 if alone else 19) * person.size * (0.96 if person.age == "kid" else 1)
        neck = GROUND - unit * build.ground
    return Pen(canvas, person.x * GRID, neck, unit, person.facing)
