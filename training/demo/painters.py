"""The hosts that sample the demo: a real ComfyUI, or diffusers; the pictures are the same."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from moa_core.moa_file import load_moa
from moa_core.subject import Subject, interpolate
from training.comfyui import Server
from training.demo.graph import graph
from training.demo.takes import CFG, CHECKPOINT, FRAMES, MOA, STEPS, Take, Who
from training.host.pipeline import MoAPipeline
from training.host.pretrained import load_base


class Painter(Protocol):
    """A host that samples: pictures [H, W, 3] uint8, and where the routers put the subjects."""

    def paint(self, take: Take) -> tuple[list[np.ndarray], Image.Image]: ...


class DiffusersPainter:
    def __init__(self, models: Path):
        base = load_base(models / "checkpoints" / CHECKPOINT)
        self.pipeline = MoAPipeline(base, load_moa(models / "moa" / MOA))

    def subject(self, who: Who) -> Subject:
        picture, mask = who.picture()
        pixels = torch.from_numpy(np.array(picture)).float()[None] / 255
        return self.pipeline.encode_subject(pixels, who.word, torch.from_numpy(mask).float()[None])

    def paint(self, take: Take) -> tuple[list[np.ndarray], Image.Image]:
        subjects = [self.subject(who) for who in take.people]
        if take.morph:
            subjects = [interpolate(subjects[0], self.subject(take.morph), 0.5, FRAMES)]
        options = {"seed": take.seed, "steps": STEPS, "cfg": CFG, "sampler": "euler", "strength": take.strength}
        pictures, trace = self.pipeline(take.prompt, subjects, batch=take.frames, same_noise=True, **options)
        pixels = [(p.numpy() * 255).astype(np.uint8) for p in pictures]
        area = trace.subject_area()[:1, None] if trace else torch.zeros(1, 1, *pixels[0].shape[:2])
        large = F.interpolate(area, pixels[0].shape[:2], mode="bicubic")[0, 0].clamp(0, 1)
        return pixels, Image.fromarray((large.numpy() * 255).astype(np.uint8)).convert("RGB")


class ComfyUIPainter:
    def __init__(self, server: Server):
        self.server = server

    def paint(self, take: Take) -> tuple[list[np.ndarray], Image.Image]:
        entry = self.server.queue(graph(take))
        pictures = [Image.open(io.BytesIO(png)) for png in self.server.pictures(entry, "save")]
        maps = self.server.pictures(entry, "maps")[0] if take.strength else None
        return [np.asarray(p) for p in pictures], Image.open(io.BytesIO(maps)) if maps else pictures[0]
