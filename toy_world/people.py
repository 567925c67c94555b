"""Drawing one person. The frame's origin is the neck, y points down, and the head's half height is 1."""

from __future__ import annotations

from dataclasses import dataclass

from .heads import SKIN_COLOURS, draw_hair_behind, draw_head, face_half_width
from .pen import Colour, Pen, Point, arc, mix
from .world import Person

COLOURS: dict[str, Colour] = {
    "red": (226, 56, 62),
    "orange": (248, 136, 44),
    "yellow": (252, 208, 58),
    "green": (62, 168, 84),
    "teal": (20, 164, 168),
    "navy": (52, 70, 150),
    "purple": (142, 78, 196),
    "white": (248, 248, 250),
}
DARK = (44, 42, 58)
WHITE = (255, 255, 255)
HANDLEBAR = (0.78, 0.92)
FLOWERS = 1.7
"""Below the head's middle: below the chin."""


@dataclass(frozen=True)
class Build:
    """Half width of the shoulders; how far below the neck hip and ground are; where the head sits."""

    shoulder: float
    hip: float
    ground: float
    head: Point

    @classmethod
    def of(cls, person: Person) -> Build:
        wide = person.identity.body_width
        shoulder = 0.56 + 0.34 * wide + (0.08 if person.word == "man" else 0)
        narrow, hip, legs, head = {
            "kid": (0.8, 0.95, 0.85, (0, -0.9)),
            "adult": (1.0, 1.45, 1.4, (0, -0.93)),
            "old": (0.96, 1.35, 1.25, (0.12, -0.74)),
        }[person.age]
        if person.action == "riding a bike":
            legs = 1.3
        return cls(shoulder * narrow, hip, hip + legs, head)


Limb = list[Point]
"""Its joints, from the body outwards."""


def joints_of_legs(person: Person, build: Build) -> list[Limb]:
    """Hip (and knee) to foot; the farther or the left leg first."""
    if person.action == "riding a bike":
        far = [(-0.15, build.hip), (0.42, build.hip + 0.2), (0.3, build.hip + 0.72)]
        return [far, [(-0.15, build.hip + 0.05), (0.52, build.hip + 0.4), (0.06, build.hip + 0.94)]]
    sides = [side * build.shoulder * 0.45 for side in (-1, 1)]
    return [[(x, build.hip - 0.1), (x * 1.1, build.ground - 0.14)] for x in sides]


def joints_of_arms(person: Person, build: Build) -> tuple[list[Limb], list[Limb]]:
    """Shoulder, elbow, hand of the arms that are drawn behind the body and of those before it; one may be hidden."""
    s = build.shoulder
    right, left = (
        [(side * (s - 0.16), 0.26), (side * (s + 0.16), 0.75), (side * (s + 0.14), build.hip - 0.1)] for side in (1, -1)
    )
    if person.action == "waving":
        hand = (max(s + 0.6, face_half_width(person.identity) + 0.5), -0.6)
        return [left], [[(s - 0.16, 0.32), (s + 0.4, 0.46), hand]]
    if person.action == "holding flowers":
        y = build.head[1] + FLOWERS
        return [left], [[(s - 0.16, 0.3), (s + 0.12, y + 0.2), (0.36, y + 0.36)]]
    if person.action == "holding a book":
        return [], [[(side * (s - 0.16), 0.3), (side * (s + 0.16), 0.85), (side * 0.74, 1.08)] for side in (-1, 1)]
    if person.action == "riding a bike":
        return [], [[(s - 0.2, 0.3), (s - 0.1, 0.75), HANDLEBAR]]
    return [right, left], []


def draw_person_at(pen: Pen, person: Person) -> None:
    """Draws with the neck at the pen's origin; held things come out as nobody's."""
    build = Build.of(person)
    head = pen.at(*build.head)
    draw_hair_behind(head, person.identity)
    legs, riding = joints_of_legs(person, build), person.action == "riding a bike"
    if riding:
        _leg(pen, person, legs[0], far=True)
        _bike(pen.nobody(), build)
    else:
        for leg in legs:
            _leg(pen, person, leg)
    _arms_behind(pen, person, build)
    _torso(pen, person, build)
    if riding:
        _leg(pen, person, legs[1])
    draw_head(head, person)
    _arms_in_front(pen, person, build)


def _leg(pen: Pen, person: Person, joints: list[Point], far: bool = False) -> None:
    clothes = person.clothes
    trousers = COLOURS[clothes.bottom]
    colour = trousers if person.word == "man" else SKIN_COLOURS[person.identity.skin]
    shoe = DARK if person.word == "man" else trousers
    width = 0.5 if person.word == "man" else 0.36
    pen.line(joints, width, mix(colour, DARK, 0.2) if far else colour)
    x, y = joints[-1]
    toe = 0.12 if person.action == "riding a bike" else (0.1 if x > 0 else -0.1)
    pen.ellipse(x + toe, y + 0.04, 0.32, 0.17, shoe)


def _torso(pen: Pen, person: Person, build: Build) -> None:
    clothes, skin = person.clothes, SKIN_COLOURS[person.identity.skin]
    top, bottom = COLOURS[clothes.top], COLOURS[clothes.bottom]
    s, hip = build.shoulder, build.hip
    man = person.word == "man"
    waist = s * (0.92 if man else 0.72) + 0.1 * person.identity.body_width
    outline = [*arc(-s + 0.3, 0.38, 0.3, 0.36, 180, 270, 6), *arc(s - 0.3, 0.38, 0.3, 0.36, 270, 360, 6)]
    foot = hip if man else hip * 0.62
    pen.polygon([*outline, (waist, foot), (-waist, foot)], top)
    if not man:
        hem, flare = hip + 0.42, s + 0.42
        if person.action == "riding a bike":
            hem, flare = hip + 0.16, s + 0.16
        skirt = [(-waist, foot), (waist, foot), (flare, hem), *arc(0, hem, flare, 0.14, 0, 180, 8)]
        pen.polygon(skirt, top)
    _pattern(pen, clothes.pattern, top, waist, foot)
    if man:
        pen.box(-waist, hip - 0.16, waist, hip + 0.14, bottom, 0.1)
        pen.polygon([(-0.34, -0.02), (0, 0.5), (0.34, -0.02)], WHITE if clothes.top != "white" else bottom)
        pen.polygon([(-0.22, -0.06), (0, 0.3), (0.22, -0.06)], mix(skin, DARK, 0.12))
    else:
        pen.box(-waist, foot - 0.08, waist, foot + 0.1, bottom)
        pen.ellipse(0, 0.04, 0.42, 0.34, mix(skin, DARK, 0.06))
        for bead in arc(0, 0.04, 0.36, 0.3, 20, 160, 6):
            pen.circle(*bead, 0.06, (255, 240, 200))


def _pattern(pen: Pen, pattern: str, top: Colour, waist: float, foot: float) -> None:
    ink = mix(top, WHITE if sum(top) < 600 else DARK, 0.55 if sum(top) < 600 else 0.25)
    if pattern == "stripes":
        for y in (0.5, 0.8, 1.1):
            if y + 0.13 < foot:
                pen.box(-waist, y, waist, y + 0.13, ink)
    if pattern == "dots":
        for y in (0.55, 0.9, 1.25):
            if y + 0.08 < foot:
                for x in (-0.66, -0.22, 0.22, 0.66):
                    pen.circle(x * waist, y, 0.09, ink)


def _arm(pen: Pen, person: Person, joints: list[Point]) -> None:
    """From the shoulder over the elbow to the hand."""
    skin, sleeve = SKIN_COLOURS[person.identity.skin], mix(COLOURS[person.clothes.top], DARK, 0.1)
    shoulder, elbow, hand = joints
    pen.line(joints, 0.3, skin)
    half = ((shoulder[0] + elbow[0]) / 2, (shoulder[1] + elbow[1]) / 2)
    pen.line(joints if person.clothes.long_sleeves else [shoulder, half], 0.38, sleeve)
    pen.circle(*hand, 0.23, skin)


def _arms_behind(pen: Pen, person: Person, build: Build) -> None:
    """The arms that hang down, and before the last of them an old person's cane."""
    behind, _ = joints_of_arms(person, build)
    for number, arm in enumerate(behind, start=1):
        if number == len(behind) and person.age == "old" and person.action != "holding flowers":
            x, y = -(build.shoulder + 0.3), build.hip - 0.15
            cane = pen.nobody()
            cane.line([(x, build.ground), (x, y), (x + 0.1, y - 0.2), (x + 0.3, y - 0.1)], 0.15, (130, 76, 42))
        _arm(pen, person, arm)


def _arms_in_front(pen: Pen, person: Person, build: Build) -> None:
    _, front = joints_of_arms(person, build)
    thing = pen.nobody()
    if person.action == "waving":
        hand = front[0][-1]
        for dx, dy in ((-0.2, -0.3), (0, -0.38), (0.2, -0.3), (-0.3, -0.02)):
            skin = SKIN_COLOURS[person.identity.skin]
            pen.line([hand, (hand[0] + dx, hand[1] + dy)], 0.15, skin)
    elif person.action == "holding flowers":
        _flowers(thing.at(0.3, build.head[1] + FLOWERS))
    elif person.action == "holding a book":
        _book(thing.at(0, 0.82), (40, 92, 214) if person.clothes.top in ("red", "orange") else (214, 44, 54))
    for arm in front:
        _arm(pen, person, arm)


def _flowers(pen: Pen) -> None:
    """A bouquet around the origin, 1.5 wide."""
    for x in (-0.4, 0, 0.4):
        pen.line([(x, -0.3), (0, 0.75)], 0.12, (46, 140, 70))
    pen.polygon([(-0.42, 0.02), (0.42, 0.02), (0.1, 0.62), (-0.1, 0.62)], (255, 250, 235))
    blooms = (
        (-0.48, -0.1, (255, 196, 40)),
        (0.48, -0.1, (255, 255, 255)),
        (-0.26, -0.48, (250, 92, 150)),
        (0.28, -0.46, (255, 140, 50)),
        (0, -0.08, (232, 40, 60)),
    )
    for x, y, colour in blooms:
        for dx, dy in ((0, -0.17), (0.16, -0.05), (0.1, 0.14), (-0.1, 0.14), (-0.16, -0.05)):
            pen.circle(x + dx, y + dy, 0.15, colour)
        pen.circle(x, y, 0.1, (255, 236, 120) if colour[1] < 150 else (240, 130, 30))


def _book(pen: Pen, cover: Colour) -> None:
    """An open book around the origin, 1.6 wide, its covers towards us."""
    for side in (-1, 1):
        pen.polygon([(0, -0.4), (side * 0.74, -0.6), (side * 0.74, 0.3), (0, 0.4)], (255, 252, 240))
        pen.polygon([(0, -0.3), (side * 0.82, -0.46), (side * 0.82, 0.4), (0, 0.54)], cover)
        pen.polygon([(side * 0.2, -0.14), (side * 0.62, -0.22), (side * 0.62, 0.02), (side * 0.2, 0.1)], WHITE)
    pen.line([(0, -0.28), (0, 0.5)], 0.09, mix(cover, DARK, 0.35))


def _bike(pen: Pen, build: Build) -> None:
    red, steel = (222, 44, 54), (150, 154, 170)
    hub = build.ground - 0.78
    back, front, seat = (-0.92, hub), (1.0, hub), (-0.3, build.hip + 0.16)
    crank, head = (-0.02, hub + 0.06), (0.78, build.hip + 0.02)
    for x, y in (back, front):
        pen.ring(x, y, 0.78, 0.17, DARK)
        pen.ring(x, y, 0.63, 0.06, (226, 228, 236))
        for dx, dy in ((0.57, 0), (0, 0.57), (0.4, 0.4), (0.4, -0.4)):
            pen.line([(x - dx, y - dy), (x + dx, y + dy)], 0.035, steel)
        pen.circle(x, y, 0.12, DARK)
    pen.line([head, crank, back, seat, (0.76, build.hip + 0.24)], 0.14, red)
    pen.line([seat, crank], 0.14, red)
    pen.line([front, head, HANDLEBAR], 0.14, red)
    pen.line([(0.6, 0.86), (0.98, 0.94)], 0.14, DARK)
    pen.line([(-0.56, build.hip + 0.1), (-0.06, build.hip + 0.1)], 0.22, DARK)
    pen.ring(*crank, 0.24, 0.1, DARK)
