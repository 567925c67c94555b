"""Drawing a head: face, beard, glasses, hair. The origin is the middle of the face, its half height 1."""

from __future__ import annotations

from .pen import Colour, Pen, Point, arc, mix
from .world import Identity, Person

SKIN_COLOURS: dict[str, Colour] = {
    "fair": (255, 226, 204),
    "peach": (250, 188, 140),
    "tan": (214, 148, 84),
    "brown": (158, 96, 58),
    "deep": (108, 66, 48),
}
HAIR_COLOURS: dict[str, Colour] = {
    "black": (34, 30, 42),
    "blond": (255, 212, 74),
    "ginger": (232, 88, 28),
    "silver": (206, 212, 224),
    "blue": (48, 108, 236),
    "pink": (250, 104, 176),
}
INK = (40, 34, 44)
WHITE = (255, 255, 255)


def face_half_width(identity: Identity) -> float:
    return 0.8 + 0.26 * identity.face_width


def _light(colour: Colour) -> Colour:
    return mix(colour, WHITE, 0.28)


def _deep(colour: Colour) -> Colour:
    return mix(colour, (30, 16, 50), 0.22)


def draw_hair_behind(pen: Pen, identity: Identity) -> None:
    """What lies behind face and body."""
    w, colour = face_half_width(identity), HAIR_COLOURS[identity.hair]
    dark = _deep(colour)
    if identity.style == "long":
        pen.polygon([*arc(0, 0, w + 0.24, 1.1, 180, 360), (w + 0.36, 1.5), (-w - 0.36, 1.5)], dark)
        for x in (-1, -0.34, 0.34, 1):
            pen.circle(x * (w + 0.06), 1.5, 0.32, dark)
    elif identity.style == "bob":
        half = [*arc(0, 0, w + 0.22, 1.16, 270, 360, 8), (w + 0.42, 0.6), (w + 0.4, 0.84), (w, 0.92)]
        pen.polygon([*half, *((-x, y) for x, y in reversed(half))], dark)
    elif identity.style == "afro":
        pen.circle(0, -0.36, 1.4, colour)
        for x, y in arc(0, -0.36, 1.24, 1.24, 150, 390, 9):
            pen.circle(x, y, 0.32, colour)
    elif identity.style == "bun":
        pen.circle(0, -1.32, 0.52, colour)
        pen.polygon(arc(0, -1.36, 0.36, 0.34, 190, 300), _light(colour))
    elif identity.style == "pigtails":
        for side in (-1, 1):
            x = side * (w + 0.4)
            pen.ellipse(x, 0.1, 0.4, 0.62, colour)
            pen.ellipse(x + side * 0.08, 0.7, 0.24, 0.4, colour)
            pen.circle(side * (w + 0.14), -0.46, 0.17, (255, 80, 90) if identity.hair != "ginger" else (60, 190, 200))
    elif identity.style == "mohawk":
        pen.polygon(_crest(), dark)


def draw_head(pen: Pen, person: Person) -> None:
    """Neck, ears, face and everything on it."""
    identity = person.identity
    skin, w = SKIN_COLOURS[identity.skin], face_half_width(identity)
    shade = _deep(skin)
    pen.box(-0.28, 0.6, 0.28, 1.22, shade, 0.2)
    for side in (-1, 1):
        pen.circle(side * w, 0.12, 0.22, skin)
        pen.circle(side * w, 0.12, 0.11, shade)
        if person.word == "woman":
            pen.circle(side * (w + 0.04), 0.42, 0.11, (255, 214, 70))
    pen.ellipse(0, 0, w, 1, skin)
    pen.ellipse(0, 0.24, w * (0.98 if person.age == "kid" else 0.9), 0.74, skin)
    face = pen.at(0.1, 0)
    if person.age == "old":
        _wrinkles(face, w, shade)
    if identity.beard:
        _beard(pen, identity, w)
    if identity.glasses:
        for side in (-1, 1):
            face.circle(side * 0.42 * w, 0.04, 0.3, mix(skin, (236, 248, 255), 0.5))
    _features(face, person, w)
    draw_hair_in_front(pen, identity, w)
    if identity.glasses:
        _glasses(face, w)


def _features(pen: Pen, person: Person, w: float) -> None:
    skin = SKIN_COLOURS[person.identity.skin]
    woman, eye = person.word == "woman", {"kid": 0.19, "adult": 0.15, "old": 0.12}[person.age]
    for side in (-1, 1):
        x = side * 0.4 * w
        pen.ellipse(side * 0.62 * w, 0.38, 0.2, 0.13, mix(skin, (255, 70, 90), 0.3))
        if woman:
            pen.line([(x, -0.04), (x + side * (eye + 0.16), -0.12)], 0.09, INK)
        pen.ellipse(x, 0.04, eye * 1.2, eye * 1.4, WHITE)
        pen.ellipse(x + 0.02, 0.05, eye, eye * 1.2, INK)
        pen.circle(x + eye * 0.35, 0.05 - eye * 0.5, eye * 0.38, WHITE)
        if person.age == "old":
            pen.line(arc(x, -0.26, 0.24, 0.17, 200, 340, 6), 0.15, (250, 250, 250))
        elif person.age == "adult":
            pen.line(arc(x, -0.2, 0.2, 0.15, 215, 325, 6), 0.08, mix(skin, INK, 0.7))
    pen.ellipse(0.04, 0.28, 0.1, 0.08, _deep(skin))
    mouth = arc(0, 0.46, 0.3, 0.24, 10, 170, 10)
    if woman:
        pen.polygon(mouth, (206, 32, 66))
    else:
        pen.polygon(mouth, (120, 30, 40))
        pen.polygon(arc(0, 0.49, 0.25, 0.09, 0, 180, 8), WHITE)


def _wrinkles(pen: Pen, w: float, shade: Colour) -> None:
    ink = mix(shade, INK, 0.25)
    for y in (-0.58, -0.7):
        pen.line([(-0.36, y), (0, y - 0.03), (0.36, y)], 0.05, ink)
    for side in (-1, 1):
        pen.line(arc(side * 0.4 * w, 0.1, 0.24, 0.2, 40, 140, 6), 0.05, ink)
        pen.line([(side * 0.3, 0.3), (side * 0.44, 0.5), (side * 0.42, 0.66)], 0.06, ink)


def _beard(pen: Pen, identity: Identity, w: float) -> None:
    colour = HAIR_COLOURS[identity.hair]
    pen.polygon([(-w, 0.1), *arc(0, 0.3, w + 0.02, 1.02, 180, 0, 18), (w * 0.8, 0.34), *_lip(w)], colour)
    pen.line(arc(0.1, 0.5, 0.34, 0.16, 200, 340, 8), 0.16, colour)


def _lip(w: float) -> list[Point]:
    """The beard's upper edge from the right cheek to the left."""
    return [(w * 0.5, 0.44), (0, 0.34), (-w * 0.5, 0.44), (-w * 0.8, 0.34)]


def _glasses(pen: Pen, w: float) -> None:
    r = 0.34
    for side in (-1, 1):
        x = side * 0.42 * w
        pen.ring(x, 0.04, r, 0.1, INK)
        pen.line([(x + side * r, 0), (side * w - 0.1, -0.04)], 0.09, INK)
    pen.line([(-0.42 * w + r, 0), (0.42 * w - r, 0)], 0.1, INK)


def _cap(pen: Pen, w: float, hairline: list[Point], colour: Colour, rise: float = 0.12) -> None:
    """Hair on top of the head, from ear to ear, down to the hairline (given from right to left)."""
    pen.polygon([*arc(0, -0.05, w + 0.08, 1 + rise, 180, 360), *hairline], colour)


def _crest() -> list[Point]:
    tips = [(-0.5, -0.9), (-0.52, -1.5), (-0.24, -1.42), (-0.12, -1.86), (0.1, -1.56), (0.34, -1.8)]
    return [*tips, (0.36, -1.4), (0.58, -1.44), (0.5, -0.9)]


def draw_hair_in_front(pen: Pen, identity: Identity, w: float) -> None:
    colour = HAIR_COLOURS[identity.hair]
    light = _light(colour)
    style = identity.style
    if style == "short":
        _cap(
            pen,
            w,
            [(w, -0.2), (w * 0.7, -0.5), (0.2, -0.42), (-w * 0.55, -0.62), (-w * 0.86, -0.3)],
            colour,
            0.2,
        )
        pen.line(arc(0, -0.1, w * 0.72, 0.9, 225, 290, 8), 0.12, light)
    elif style == "long":
        part = [(w + 0.05, 0.5), (w * 0.84, -0.2), (-0.2, -0.8), (-w * 0.88, -0.1), (-w - 0.05, 0.5)]
        _cap(pen, w, part, colour)
        pen.line(arc(0, -0.05, w * 0.76, 0.86, 290, 340, 8), 0.12, light)
    elif style == "bob":
        fringe = [(w + 0.18, 0.3), (w * 0.84, -0.28), (0, -0.36), (-w * 0.84, -0.28), (-w - 0.18, 0.3)]
        _cap(pen, w + 0.14, fringe, colour, 0.2)
        pen.line(arc(0, -0.05, w * 0.76, 0.86, 215, 325, 10), 0.13, light)
    elif style == "afro":
        _cap(pen, w, [(w, -0.1), (w * 0.72, -0.5), (0, -0.62), (-w * 0.72, -0.5), (-w, -0.1)], colour)
    elif style in ("bun", "pigtails"):
        _cap(
            pen,
            w,
            [(w * 0.98, -0.1), (w * 0.6, -0.56), (0, -0.74), (-w * 0.6, -0.56), (-w * 0.98, -0.1)],
            colour,
        )
        pen.line(arc(0, -0.05, w * 0.72, 0.9, 285, 330, 8), 0.1, light)
    elif style == "mohawk":
        pen.polygon([*_crest(), (0.3, -0.56), (0, -0.44), (-0.3, -0.56)], colour)
        pen.line([(-0.1, -1.5), (-0.02, -0.8)], 0.1, light)
    elif style == "bald":
        for side in (-1, 1):
            for y, r in ((-0.22, 0.26), (0.1, 0.28), (0.36, 0.2)):
                pen.circle(side * (w + 0.08), y, r, colour)
        pen.line(arc(0, -0.1, w * 0.6, 0.74, 215, 250, 6), 0.12, WHITE)
