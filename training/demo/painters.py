"""The hosts that sample the demo: a real ComfyUI, or diffusers; the pictures are the same."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from moa_core.adapters.deltas import deltas_of
from moa_core.adapters.run import Adapters
from moa_core.learned.moa_file import load_moa
from moa_core.routing.trace import Trace
from moa_core.subjects.subject import Subject, interpolate
from toy_world.draw import draw_person_pose
from toy_world.world import someone
from training.comfyui import Server
from training.comfyui.templates import saved_by
from training.demo.applications import APPLICATIONS, NOT_ONE_CALL, ByLoRA, Shot
from training.demo.graph import graph
from training.demo.takes import CFG, CHECKPOINT, MOA, STEPS, Take, Who
from training.host.lora import read_lora, write_into
from training.host.pipeline import Control, MoAPipeline, controlled_by
from training.host.pretrained import load_base
from training.host.tokenizer import bind_prompt
from training.toy.pretrain import controlnet

INVERSION_STEPS = 50
CONTROL_STRENGTH = 1.5
Gallery = dict[str, list[Image.Image]]
"""The pictures of an application by their titles in its workflow."""


class Painter(Protocol):
    """A host that samples."""

    def paint(self, take: Take) -> tuple[list[np.ndarray], Image.Image]:
        """Pictures [H, W, 3] uint8, and where the routers put the subjects."""

    def show(self, application: str) -> Gallery | str:
        """What a shared workflow shows, or why this host does not."""


class DiffusersPainter:
    def __init__(self, models: Path):
        self.models = models
        self.pipeline_with = cache(self._pipeline_with)
        self.pipeline = self.pipeline_with(())

    def _pipeline_with(self, loras: tuple[str, ...]) -> MoAPipeline:
        """With these LoRAs written into the base model."""
        base = load_base(self.models / "checkpoints" / CHECKPOINT)
        for file in loras:
            write_into(base.unet, read_lora(base.unet, self.models / "loras" / file))
        return MoAPipeline(base, load_moa(self.models / "moa" / MOA))

    def subject(self, who: Who | ByLoRA) -> Subject:
        if isinstance(who, ByLoRA):
            return Subject(torch.ones(1, 1), who.word, who.file, adapter=who)
        picture, mask = who.picture()
        return self.pipeline.encode_subject(_pixels(picture)[None], who.word, torch.from_numpy(mask).float()[None])

    def _with_deltas(self, pipeline: MoAPipeline, subjects: list[Subject]) -> MoAPipeline:
        """With the LoRAs of those subjects that have one."""
        known = [subject for subject in subjects if subject.adapter]
        if not known:
            return pipeline
        files = [read_lora(pipeline.base.unet, self.models / "loras" / subject.adapter.file) for subject in known]
        parts = {subject: [number] for number, subject in enumerate(known)}
        adapters = Adapters({}, parts, deltas_of(pipeline.base.unet, files))
        return MoAPipeline(pipeline.base, pipeline.moa, pipeline.unet, adapters)

    def paint(self, take: Take) -> tuple[list[np.ndarray], Image.Image]:
        pictures, trace = self._sample(take)
        drawn = [(p.numpy() * 255).astype(np.uint8) for p in pictures]
        area = trace.subject_area()[:1, None] if trace else torch.zeros(1, 1, *drawn[0].shape[:2])
        large = F.interpolate(area, drawn[0].shape[:2], mode="bicubic")[0, 0].clamp(0, 1)
        return drawn, Image.fromarray((large.numpy() * 255).astype(np.uint8)).convert("RGB")

    def _sample(self, take: Take) -> tuple[Tensor, Trace]:
        """Pictures [B, H, W, 3] in 0..1, and the routers' trace."""
        shot = Shot(**vars(take))  # a plain take is a shot with nothing beside MoA
        subjects = [self.subject(who) for who in shot.people]
        if shot.morph:
            subjects = [interpolate(subjects[0], self.subject(shot.morph), 0.5, shot.frames)]
        other, share = shot.toward or (shot.prompt, 0.0)
        pipeline = self._with_deltas(self.pipeline_with(shot.loras), subjects)
        prompt = torch.lerp(pipeline.encode_prompt(shot.prompt), pipeline.encode_prompt(other), share)
        return pipeline.sample(
            prompt,
            pipeline.encode_prompt(""),
            bind_prompt(other, subjects).bindings,
            strength=shot.strength,
            batch=shot.frames,
            same_noise=shot.morph is not None,
            sampler="euler",
            control=self._control(*shot.pose) if shot.pose else None,
            **self._start(shot),
        )

    def _control(self, who: Who, action: str) -> Control:
        network = controlnet.load_control_lora(self.pipeline.base, self.models / "controlnet" / controlnet.FILE)
        skeleton = draw_person_pose(someone(who.seed, who.word), who.word, action, "portrait")
        return controlled_by(network, _pixels(skeleton), CONTROL_STRENGTH)

    def _start(self, shot: Shot) -> dict[str, Any]:
        """What a shot begins from, and for how long."""
        if shot.photo:
            noise = self.pipeline.invert(self._sample(shot.photo)[0][0], shot.prompt, INVERSION_STEPS)
            return {"start": noise, "steps": INVERSION_STEPS, "cfg": 1.0}
        return {"seed": shot.seed, "steps": STEPS, "cfg": CFG}

    def show(self, application: str) -> Gallery | str:
        if application in NOT_ONE_CALL:
            return f"{NOT_ONE_CALL[application]}, which is no single call in diffusers; ComfyUI draws it"
        return {
            title: [Image.fromarray(picture) for take in shown for picture in self.paint(take)[0]]
            for title, shown in APPLICATIONS[application].items()
        }


class ComfyUIPainter:
    def __init__(self, server: Server):
        self.server = server

    def paint(self, take: Take) -> tuple[list[np.ndarray], Image.Image]:
        entry = self.server.queue(graph(take))
        pictures = [Image.open(io.BytesIO(png)) for png in self.server.pictures(entry, "save")]
        maps = self.server.pictures(entry, "maps")[0] if take.strength else None
        return [np.asarray(p) for p in pictures], Image.open(io.BytesIO(maps)) if maps else pictures[0]

    def show(self, application: str) -> Gallery | str:
        return saved_by(application, self.server)


def _pixels(picture: Image.Image) -> Tensor:
    """[H, W, 3] in 0..1."""
    return torch.from_numpy(np.array(picture)).float() / 255
