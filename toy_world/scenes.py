"""The six places, each one a function that fills the canvas; the ground begins at about y = 90."""

from __future__ import annotations

import random
from collections.abc import Callable

from .pen import GRID, Canvas, Colour, Pen, arc, mix

WHITE = (255, 255, 255)
SHADOWS: dict[str, Colour] = {
    "beach": (228, 194, 126),
    "city": (70, 68, 112),
    "forest": (98, 160, 76),
    "mountain": (206, 218, 238),
    "room": (150, 64, 70),
    "lavender": (104, 66, 164),
}


def draw_place(canvas: Canvas, place: str, details: int) -> None:
    """Fills the whole canvas; `details` is the seed of everything that no word names."""
    PAINTERS[place](canvas, Pen(canvas), random.Random(details))


def beach(canvas: Canvas, pen: Pen, rng: random.Random) -> None:
    canvas.gradient((104, 198, 250), (222, 246, 255), 0, 66)
    _sun(pen, rng, (255, 226, 92), (255, 243, 178), 22)
    for _ in range(3):
        _cloud(pen, rng.uniform(0, GRID), rng.uniform(12, 44), rng.uniform(5, 8), WHITE)
    canvas.gradient((22, 140, 196), (84, 206, 214), 62, 96)
    for _ in range(9):
        x, y = rng.uniform(0, GRID), rng.uniform(65, 82)
        pen.line([(x, y), (x + rng.uniform(5, 12), y)], 0.9, (190, 238, 242))
    x = rng.choice((16, 112)) + rng.uniform(-6, 6)
    pen.polygon([(x, 44), (x, 67), (x + 11, 64)], WHITE)
    pen.polygon([(x - 1, 50), (x - 1, 66), (x - 8, 64)], (255, 120, 100))
    pen.polygon([(x - 10, 68), (x + 12, 68), (x + 8, 73), (x - 7, 73)], (170, 92, 60))
    shore = rng.uniform(84, 89)
    wave = [(i * 8, shore + rng.uniform(-1.5, 1.5)) for i in range(17)]
    pen.polygon([*((x, y - 2.5) for x, y in wave), (GRID, GRID), (0, GRID)], WHITE)
    pen.polygon([*wave, (GRID, GRID), (0, GRID)], (250, 222, 152))
    for _ in range(12):
        pen.circle(rng.uniform(0, GRID), rng.uniform(94, 126), 0.7, (234, 200, 128))
    side = rng.choice((-1, 1))
    _palm(Pen(canvas, 64 - side * 58, 100, 1, side))
    _parasol(Pen(canvas, 64 + side * 50, 104, 1, side), rng)


def city(canvas: Canvas, pen: Pen, rng: random.Random) -> None:
    canvas.gradient((38, 34, 104), (150, 98, 176), 0, 96)
    for _ in range(28):
        pen.circle(rng.uniform(0, GRID), rng.uniform(0, 48), rng.choice((0.4, 0.7)), (255, 250, 220))
    x, y = rng.uniform(12, 116), rng.uniform(10, 20)
    pen.circle(x, y, 10, (92, 80, 160))
    pen.circle(x, y, 7.5, (255, 246, 206))
    pen.circle(x + 2, y - 1.5, 1.6, (236, 222, 170))
    _skyline(pen, rng, (112, 92, 178), (196, 158, 196), low=38, high=66, width=13)
    _skyline(pen, rng, (72, 66, 144), (255, 214, 104), low=54, high=78, width=17)
    pen.box(0, 94, GRID, GRID, (98, 94, 138))
    pen.box(0, 94, GRID, 99, (148, 142, 182))
    for i in range(-1, 6):
        x = i * 26 + rng.uniform(0, 4)
        pen.polygon([(x, 122), (x + 14, 122), (x + 13, 125.5), (x - 1, 125.5)], (224, 214, 196))
    for x in (6, 122):
        pen.box(x - 1.2, 46, x + 1.2, 98, (44, 42, 84))
        pen.circle(x, 44, 8.5, (184, 144, 160))
        pen.circle(x, 44, 5, (255, 236, 150))


def forest(canvas: Canvas, pen: Pen, rng: random.Random) -> None:
    canvas.gradient((222, 246, 214), (176, 226, 158), 0, 92)
    for i in range(9):
        x = i * 16 + rng.uniform(-5, 5)
        pen.box(x - 2, 20, x + 2, 92, (172, 204, 150))
        pen.ellipse(x, rng.uniform(14, 34), 12, 20, (158, 210, 146))
    pen.polygon([*arc(64, 104, 100, 18, 180, 360), (GRID, GRID), (0, GRID)], (132, 196, 96))
    for x in (rng.uniform(2, 18), rng.uniform(108, 126), rng.uniform(40, 88)):
        if 30 < x < 98:
            _pine(Pen(canvas, x, 90, 0.85), (84, 166, 108), None)
        else:
            _tree(Pen(canvas, x, 98, rng.uniform(1.0, 1.15)), rng)
    pen.polygon([(56, 88), (70, 88), (98, GRID), (26, GRID)], (226, 206, 154))
    for _ in range(9):
        x, y = rng.uniform(2, 126), rng.uniform(98, 125)
        for lean in (-1.5, 0, 1.5):
            pen.line([(x, y), (x + lean, y - 4)], 0.8, (88, 160, 72))
    for x in (rng.uniform(4, 30), rng.uniform(98, 124)):
        y = rng.uniform(104, 122)
        pen.box(x - 1.3, y - 4, x + 1.3, y, (255, 244, 226), 1)
        pen.polygon(arc(x, y - 3.6, 4.2, 4.6, 180, 360), (230, 66, 58))
        pen.circle(x - 1.6, y - 5.6, 0.8, WHITE)
        pen.circle(x + 1.5, y - 5, 0.8, WHITE)


def mountain(canvas: Canvas, pen: Pen, rng: random.Random) -> None:
    canvas.gradient((96, 172, 238), (206, 232, 252), 0, 96)
    _sun(pen, rng, (255, 240, 170), (222, 236, 230), 18)
    _cloud(pen, rng.uniform(10, 118), rng.uniform(12, 30), 6, WHITE)
    for x, top, half, rock in (
        (rng.uniform(8, 28), rng.uniform(38, 48), 44, (138, 160, 202)),
        (rng.uniform(100, 120), rng.uniform(36, 46), 44, (138, 160, 202)),
        (rng.uniform(54, 74), rng.uniform(18, 28), 50, (108, 130, 180)),
    ):
        _peak(pen, x, top, half, rock)
    for i in range(11):
        x = i * 12.8 + rng.uniform(-4, 4)
        _pine(Pen(canvas, x, 94, rng.uniform(0.4, 0.55)), (70, 128, 136), WHITE)
    pen.polygon([*arc(64, 108, 110, 20, 180, 360), (GRID, GRID), (0, GRID)], (240, 246, 255))
    pen.polygon([*arc(24, 126, 70, 16, 180, 360), (GRID, GRID), (0, GRID)], (226, 236, 250))
    for x in (rng.uniform(2, 12), rng.uniform(116, 126)):
        _pine(Pen(canvas, x, 106, rng.uniform(1.0, 1.2)), (44, 112, 112), WHITE)
    for _ in range(26):
        pen.circle(rng.uniform(0, GRID), rng.uniform(0, 88), rng.choice((0.7, 1.1)), WHITE)


def room(canvas: Canvas, pen: Pen, rng: random.Random) -> None:
    wall = rng.choice(((190, 224, 208), (250, 232, 180), (186, 214, 236)))
    pen.box(0, 0, GRID, 98, wall)
    for i in range(8):
        pen.box(i * 16, 0, i * 16 + 8, 92, mix(wall, WHITE, 0.18))
    pen.box(0, 92, GRID, 97, WHITE)
    canvas.gradient((214, 158, 104), (190, 130, 82), 97, GRID)
    for y in (104, 113, 122):
        pen.line([(0, y), (GRID, y)], 0.7, (176, 118, 74))
    side = rng.choice((-1, 1))
    _window(Pen(canvas, 64 - side * 34, 30, 1, side))
    _painting(Pen(canvas, 64 + side * 34, 26, 1, side), rng)
    pen.ellipse(64, 118, 58, 9.5, (244, 214, 160))
    pen.ellipse(64, 118, 53, 8, (178, 84, 88))
    _sofa(Pen(canvas, 64 + rng.uniform(-5, 5), 104), (232, 110, 92))
    _floor_lamp(Pen(canvas, 64 - side * 58, 106))
    _potted_plant(Pen(canvas, 64 + side * 58, 110))


def lavender(canvas: Canvas, pen: Pen, rng: random.Random) -> None:
    canvas.gradient((255, 184, 136), (255, 236, 190), 0, 66)
    _sun(pen, rng, (255, 246, 196), (255, 216, 156), 34)
    for _ in range(2):
        _cloud(pen, rng.uniform(0, GRID), rng.uniform(8, 34), rng.uniform(4, 7), (255, 226, 206))
    pen.polygon([*arc(rng.uniform(10, 50), 70, 60, 18, 180, 360), (GRID, 74), (0, 74)], (174, 170, 206))
    pen.polygon([*arc(rng.uniform(80, 120), 72, 62, 15, 180, 360), (GRID, 76), (0, 76)], (146, 176, 142))
    _cottage(Pen(canvas, rng.choice((20, 108)) + rng.uniform(-8, 8), 70))
    vanishing = rng.uniform(54, 74)
    pen.box(0, 69, GRID, GRID, (120, 82, 184))
    for i in range(-11, 12):
        x0, x1 = vanishing + i * 4.2, vanishing + i * 26
        colour = ((186, 142, 236), (160, 112, 220))[i % 2]
        pen.polygon([(x0 - 1.4, 69), (x0 + 1.4, 69), (x1 + 9, GRID), (x1 - 9, GRID)], colour)
        for share in (0.2, 0.36, 0.52, 0.68, 0.84, 0.97):
            x, y, r = x0 + (x1 - x0) * share, 69 + 59 * share, 0.8 + 3.4 * share
            pen.ellipse(x - r, y, r * 0.8, r, mix(colour, WHITE, 0.2))
            pen.ellipse(x + r, y + r / 2, r * 0.8, r, mix(colour, (110, 60, 190), 0.25))


PAINTERS: dict[str, Callable[[Canvas, Pen, random.Random], None]] = {
    "beach": beach,
    "city": city,
    "forest": forest,
    "mountain": mountain,
    "room": room,
    "lavender": lavender,
}


def _sun(pen: Pen, rng: random.Random, disc: Colour, glow: Colour, y: float) -> None:
    x = rng.uniform(14, 114)
    pen.circle(x, y, 12, glow)
    pen.circle(x, y, 8.5, disc)


def _cloud(pen: Pen, x: float, y: float, r: float, colour: Colour) -> None:
    pen.circle(x, y, r, colour)
    pen.circle(x - r * 1.1, y + r * 0.3, r * 0.7, colour)
    pen.circle(x + r * 1.1, y + r * 0.25, r * 0.75, colour)
    pen.box(x - r * 1.8, y + r * 0.2, x + r * 1.85, y + r, colour, r * 0.4)


def _palm(pen: Pen) -> None:
    pen.line([(0, 0), (2, -22), (7, -44), (14, -60)], 4, (160, 108, 66))
    for dx, dy in ((-20, 2), (-15, -11), (-2, -16), (14, -12), (20, 2), (10, 13)):
        tip = (14 + dx, -60 + dy)
        side = (14 + dx * 0.5 - dy * 0.22, -64 + dy * 0.5 + abs(dx) * 0.05)
        other = (14 + dx * 0.5 + dy * 0.22, -58 + dy * 0.5)
        pen.polygon([(14, -60), side, tip, other], (52, 158, 88) if dy < 0 else (36, 136, 78))
    pen.circle(13, -57, 2.2, (126, 80, 48))
    pen.circle(16.5, -58, 2.2, (126, 80, 48))


def _parasol(pen: Pen, rng: random.Random) -> None:
    colour = rng.choice(((240, 88, 84), (255, 150, 60), (60, 130, 220)))
    pen.line([(0, 0), (0, -40)], 1.8, WHITE)
    for i in range(6):
        pen.polygon([(0, -44), *arc(0, -28, 19, 16, 180 + 30 * i, 210 + 30 * i, 4)], WHITE if i % 2 else colour)


def _skyline(pen: Pen, rng: random.Random, wall: Colour, light: Colour, low: float, high: float, width: float) -> None:
    x = -rng.uniform(0, width)
    while x < GRID:
        w, top = width * rng.uniform(0.85, 1.3), rng.uniform(low, high)
        pen.box(x, top, x + w - 1, 96, wall)
        columns = int((w - 3) // 4)
        for row in range(int((92 - top) // 6)):
            for column in range(columns):
                if rng.random() < 0.55:
                    left, y = x + 2 + column * 4, top + 3 + row * 6
                    pen.box(left, y, left + 2, y + 3, light)
        x += w


def _tree(pen: Pen, rng: random.Random) -> None:
    pen.polygon([(-4, -50), (4, -50), (6, 0), (-6, 0)], (136, 92, 62))
    green = rng.choice(((78, 164, 86), (98, 176, 82)))
    for x, y, r in ((-12, -58, 13), (12, -58, 13), (0, -72, 16), (0, -54, 13)):
        pen.circle(x, y, r, green)
    for x, y, r in ((-8, -64, 6), (7, -76, 6), (12, -58, 4)):
        pen.circle(x, y, r, mix(green, (230, 255, 150), 0.3))


def _pine(pen: Pen, green: Colour, snow: Colour | None) -> None:
    pen.box(-2, -8, 2, 0, (122, 86, 66))
    for i, half in enumerate((13, 10.5, 8)):
        foot, top = -6 - 11 * i, -28 - 11 * i
        pen.polygon([(-half, foot), (0, top), (half, foot)], mix(green, WHITE, 0.06 * i))
        if snow:
            pen.polygon([(-half * 0.5, top + 11), (0, top), (half * 0.5, top + 11), (0, top + 8)], snow)


def _peak(pen: Pen, x: float, top: float, half: float, rock: Colour) -> None:
    pen.polygon([(x - half, 98), (x, top), (x + half, 98)], rock)
    pen.polygon([(x, top), (x + half, 98), (x + half * 0.1, 98)], mix(rock, (60, 70, 120), 0.18))
    h = (98 - top) * 0.36
    w = half * 0.36
    zigzag = [(x + w, top + h), (x + w * 0.5, top + h * 0.8), (x + w * 0.15, top + h * 1.25)]
    zigzag += [(x - w * 0.3, top + h * 0.8), (x - w * 0.6, top + h * 1.15), (x - w, top + h)]
    pen.polygon([(x, top), *zigzag], WHITE)


def _window(pen: Pen) -> None:
    pen.box(-17, -22, 17, 22, WHITE, 1)
    pen.box(-14.5, -19.5, 14.5, 19.5, (150, 214, 250))
    pen.circle(7, -10, 4.5, (255, 236, 140))
    pen.polygon([*arc(0, 19.5, 14.5, 14, 180, 360)], (132, 196, 120))
    pen.box(-1, -20, 1, 20, WHITE)
    pen.box(-15, -1, 15, 1, WHITE)
    pen.polygon([(-21, -25), (-9, -25), (-16, 24), (-21, 24)], (240, 190, 96))
    pen.polygon([(21, -25), (9, -25), (16, 24), (21, 24)], (240, 190, 96))
    pen.line([(-24, -25), (24, -25)], 1.8, (150, 98, 62))


def _painting(pen: Pen, rng: random.Random) -> None:
    pen.box(-13, -11, 13, 11, (150, 98, 62), 1)
    pen.box(-11, -9, 11, 9, (255, 246, 226))
    for _ in range(3):
        colour = rng.choice(((240, 108, 92), (60, 150, 170), (250, 190, 70), (110, 90, 180)))
        pen.circle(rng.uniform(-6, 6), rng.uniform(-4, 4), rng.uniform(2, 4.5), colour)


def _sofa(pen: Pen, colour: Colour) -> None:
    dark, light = mix(colour, (110, 20, 50), 0.25), mix(colour, WHITE, 0.16)
    for x in (-42, 42):
        pen.box(x - 2.5, 0, x + 2.5, 7, (110, 70, 46))
    pen.box(-48, -46, 48, 0, colour, 8)
    pen.box(-1, -44, 1, -18, dark)
    pen.box(-46, -22, 0, -6, light, 4)
    pen.box(0, -22, 46, -6, light, 4)
    pen.box(-46, -7, 46, 2, dark, 2)
    for x in (-50, 50):
        pen.box(x - 7, -32, x + 7, 3, dark if x < 0 else colour, 6)
        pen.box(x - 7, -32, x + 7, 3, mix(colour, dark, 0.5), 6)
    pen.box(-40, -38, -24, -20, (255, 214, 110), 4)
    pen.box(24, -38, 40, -20, (90, 182, 186), 4)


def _floor_lamp(pen: Pen) -> None:
    pen.line([(0, 0), (0, -52)], 1.8, (96, 72, 66))
    pen.ellipse(0, 0, 6, 1.8, (96, 72, 66))
    pen.polygon([(-5, -68), (5, -68), (9.5, -50), (-9.5, -50)], (255, 232, 150))


def _potted_plant(pen: Pen) -> None:
    for dx, dy in ((-10, -36), (10, -38), (0, -46), (-13, -24), (13, -26)):
        pen.polygon([(-1.5, -12), (dx - 3, dy + 8), (dx, dy), (dx + 3, dy + 8), (1.5, -12)], (62, 150, 96))
    pen.polygon([(-8, -14), (8, -14), (6, 2), (-6, 2)], (250, 246, 240))


def _cottage(pen: Pen) -> None:
    pen.box(-8, -9, 8, 1, (255, 242, 220))
    pen.polygon([(-10, -8), (0, -17), (10, -8)], (220, 104, 78))
    pen.box(-2, -5, 2, 1, (150, 98, 62))
    pen.ellipse(14, -9, 3, 11, (84, 136, 92))
    pen.ellipse(19, -6, 2.4, 8, (96, 148, 100))
