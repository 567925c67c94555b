"""`make demo`: what MoA does, on one sheet, with the toy models that come with the pack.

Through a real ComfyUI where there is one, through the diffusers pipeline otherwise; the pictures are the same.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from moa_core.moa_file import load_moa
from moa_core.subject import Subject, interpolate
from toy_world.draw import draw_person
from toy_world.world import someone
from training.comfyui import PACK, Server, find_comfyui, make_base_directory, version
from training.host.pipeline import MoAPipeline
from training.host.pretrained import load_base

OUTPUT = PACK / "output"
CHECKPOINT, MOA = "moa-toy-base.safetensors", "moa-toy.safetensors"
STEPS, CFG = 20, 2.5
FRAMES = 6


@dataclass(frozen=True)
class Who:
    """A reference person, as Toy Subject draws them."""

    seed: int
    word: str

    def picture(self) -> tuple[Image.Image, np.ndarray]:
        """The reference and the person's mask."""
        return draw_person(someone(self.seed, self.word), self.word)


@dataclass(frozen=True)
class Shot:
    """One sampling. people bind to their words; strength 0 is the prior.

    morph: the one person becomes another, frame by frame from the same noise.
    """

    prompt: str
    seed: int
    people: tuple[Who, ...]
    strength: float = 1.0
    morph: Who | None = None

    @property
    def frames(self) -> int:
        return FRAMES if self.morph else 1


A, B, W = Who(1, "man"), Who(8, "man"), Who(13, "woman")
ALONE = ("a portrait of a man waving on a beach", 36)
PRIOR, WITH_A, WITH_B = Shot(*ALONE, (A,), 0.0), Shot(*ALONE, (A,)), Shot(*ALONE, (B,))
TOGETHER = Shot("a portrait of a man standing and a woman holding flowers in a forest", 6, (A, W))
MORPH = Shot(*ALONE, (A,), morph=B)


class Painter(Protocol):
    """A host that samples: pictures [H, W, 3] uint8, and where the routers put the subjects."""

    def paint(self, shot: Shot) -> tuple[list[np.ndarray], Image.Image]: ...


class DiffusersPainter:
    def __init__(self, models: Path):
        base = load_base(models / "checkpoints" / CHECKPOINT)
        self.pipeline = MoAPipeline(base, load_moa(models / "moa" / MOA))

    def subject(self, who: Who) -> Subject:
        picture, mask = who.picture()
        pixels = torch.from_numpy(np.array(picture)).float()[None] / 255
        return self.pipeline.encode_subject(pixels, who.word, torch.from_numpy(mask).float()[None])

    def paint(self, shot: Shot) -> tuple[list[np.ndarray], Image.Image]:
        subjects = [self.subject(who) for who in shot.people]
        if shot.morph:
            subjects = [interpolate(subjects[0], self.subject(shot.morph), 0.5, FRAMES)]
        options = {"seed": shot.seed, "steps": STEPS, "cfg": CFG, "sampler": "euler", "strength": shot.strength}
        pictures, trace = self.pipeline(shot.prompt, subjects, batch=shot.frames, same_noise=True, **options)
        pixels = [(p.numpy() * 255).astype(np.uint8) for p in pictures]
        area = trace.subject_area()[:1, None] if trace else torch.zeros(1, 1, *pixels[0].shape[:2])
        large = F.interpolate(area, pixels[0].shape[:2], mode="bicubic")[0, 0].clamp(0, 1)
        return pixels, Image.fromarray((large.numpy() * 255).astype(np.uint8)).convert("RGB")


class ComfyUIPainter:
    def __init__(self, server: Server):
        self.server = server

    def paint(self, shot: Shot) -> tuple[list[np.ndarray], Image.Image]:
        entry = self.server.queue(graph(shot))
        pictures = [Image.open(io.BytesIO(png)) for png in self.server.pictures(entry, "save")]
        maps = self.server.pictures(entry, "maps")[0] if shot.strength else None
        return [np.asarray(p) for p in pictures], Image.open(io.BytesIO(maps)) if maps else pictures[0]


def graph(shot: Shot) -> dict[str, Any]:
    """The shot as an API workflow."""
    nodes = {
        "base": _node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT),
        "moa": _node("MoALoader", moa_name=MOA),
        "patch": _node(
            "MoAPatchModel",
            model=["base", 0],
            clip=["base", 1],
            moa=["moa", 0],
            strength=shot.strength,
            start_percent=0.0,
            end_percent=1.0,
            routing="sparse",
        ),
        "positive": _node("CLIPTextEncode", clip=["patch", 1], text=shot.prompt),
        "negative": _node("CLIPTextEncode", clip=["patch", 1], text=""),
        "empty": _node("EmptyLatentImage", width=128, height=128, batch_size=shot.frames),
        "latent": _node("LatentBatchSeedBehavior", samples=["empty", 0], seed_behavior="fixed"),
        "sample": _node(
            "KSampler",
            model=["patch", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["latent", 0],
            seed=shot.seed,
            steps=STEPS,
            cfg=CFG,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        "decode": _node("VAEDecode", samples=["sample", 0], vae=["base", 2]),
        "save": _node("SaveImage", images=["decode", 0], filename_prefix="moa"),
    }
    everyone = [*shot.people, *([shot.morph] if shot.morph else [])]
    for n, who in enumerate(everyone):
        nodes[f"toy{n}"] = _node("MoAToySubject", seed=who.seed, pose="standing", word=who.word)
        nodes[f"subject{n}"] = _node(
            "MoASubjectEncoder", moa=["moa", 0], image=[f"toy{n}", 0], word=who.word, mask=[f"toy{n}", 1]
        )
    bound = [f"subject{n}" for n in range(len(shot.people))]
    if shot.morph:
        nodes["morph"] = _node(
            "MoASubjectInterpolate",
            subject_a=["subject0", 0],
            subject_b=["subject1", 0],
            amount=0.5,
            frames=FRAMES,
            method="linear",
        )
        bound = ["morph"]
    for n, subject in enumerate(bound):
        nodes["patch"]["inputs"][f"subjects.subject{n}"] = [subject, 0]
    if shot.strength:  # the prior has no routers to look at
        nodes["visualize"] = _node(
            "MoARouterVisualizer", model=["patch", 0], samples=["sample", 0], image=["decode", 0]
        )
        nodes["maps"] = _node("PreviewImage", images=["visualize", 0])
    return nodes


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def main() -> None:
    OUTPUT.mkdir(exist_ok=True)
    comfyui = find_comfyui()
    if comfyui is None:
        print("No ComfyUI found: sampling through the diffusers pipeline.")
        sheet = draw_sheet(DiffusersPainter(PACK / "models"))
    else:
        print(f"Sampling in ComfyUI {version(comfyui)} ({comfyui}).")
        with Server(comfyui, make_base_directory(OUTPUT / "comfyui")) as server:
            sheet = draw_sheet(ComfyUIPainter(server))
    sheet.save(OUTPUT / "contact_sheet.png")
    print(f"Contact sheet: {OUTPUT / 'contact_sheet.png'}")


def draw_sheet(painter: Painter) -> Image.Image:
    """References, the same seed without and with each of them, two people, a morph, the routers' maps."""
    alone = [painter.paint(shot) for shot in (PRIOR, WITH_A, WITH_B)]
    together = painter.paint(TOGETHER)
    morph, _ = painter.paint(MORPH)
    references = {"subject A": A, "subject B": B, "subject C": W}
    rows = [
        [(name, who.picture()[0]) for name, who in references.items()],
        [(name, _image(pixels)) for name, (pixels, _) in zip(("prior", "with A", "with B"), alone, strict=True)],
        [("A and C", _image(together[0])), *((f"A to B, {n + 1}", Image.fromarray(p)) for n, p in enumerate(morph))],
        [("routers: with A", alone[1][1]), ("routers: A and C", together[1])],
    ]
    first = [*rows[0], *rows[1]]
    titles = [f'"{ALONE[0]}", the same seed', f'"{TOGETHER.prompt}"; the picture above, from A to B', ""]
    return paste_rows(titles, [first, rows[2], rows[3]])


def _image(pixels: Sequence[np.ndarray]) -> Image.Image:
    return Image.fromarray(pixels[0])


def paste_rows(titles: list[str], rows: list[list[tuple[str, Image.Image]]], width: int = 1600) -> Image.Image:
    """Named pictures in rows of the same width, each row under its title."""
    gap, line = 8, 26
    font, strips = ImageFont.load_default(17), []
    for title, row in zip(titles, rows, strict=True):
        # All of a row get one height, so that together they are as wide as the sheet.
        shapes = [picture.width / picture.height for _, picture in row]
        height = round((width - gap * (len(row) + 1)) / sum(shapes))
        top = line * (2 if title else 1) + 4
        strip = Image.new("RGB", (width, top + height + gap), "white")
        draw = ImageDraw.Draw(strip)
        draw.text((gap, 2), title, "black", font)
        lefts = itertools.accumulate((round(height * shape) + gap for shape in shapes), initial=gap)
        for left, shape, (name, picture) in zip(lefts, shapes, row, strict=False):
            draw.text((left, top - line), name, (90, 90, 90), font)
            side = (round(height * shape), height)
            strip.paste(picture.convert("RGB").resize(side, Image.Resampling.LANCZOS), (left, top))
        strips.append(strip)
    sheet = Image.new("RGB", (width, sum(strip.height for strip in strips)), "white")
    for strip, top in zip(strips, itertools.accumulate((s.height for s in strips), initial=0), strict=False):
        sheet.paste(strip, (0, top))
    return sheet


if __name__ == "__main__":
    main()
