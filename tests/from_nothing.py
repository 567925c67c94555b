"""The page "From nothing to a shared MoA" of training/README.md, run as it stands there on tiny models."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from planted_models import make_captioner, make_facenet, make_matcher, make_segmenter
from toy_run import PACK

from toy_world.draw import draw_person
from toy_world.world import sample_identity

SMALL = {"optimizer": {"batch": 2, "accumulate": 1, "steps": 3, "lr": 1e-3}, "data": {"workers": 0},
         "model": {"trainable_encoder_layers": 1}, "run": {"precision": "float32", "validate_every": 0}}  # fmt: skip
"""What a test changes of the page's configuration."""
FEW = {"prepare": ["--workers", "0"], "latents": ["--workers", "0"], "evaluate": ["--images", "1", "--steps", "2"]}
"""What it adds to a command."""
ANN = 27
"""A toy person in whose portrait MTCNN finds a face."""


def page() -> str:
    text = (PACK / "training/README.md").read_text(encoding="utf-8")
    return text.split("## From nothing to a shared MoA\n")[1].split("\n## ")[0]


def configuration() -> dict:
    """The page's `mine.yaml`."""
    return yaml.safe_load(re.search(r"```yaml\n(.*?)```", page(), re.DOTALL)[1])


def commands() -> list[list[str]]:
    """Module and arguments of each command, in the page's order."""
    block = re.search(r"```\n(python .*?)```", page(), re.DOTALL)[1].replace("\\\n", " ")
    return [shlex.split(line.removeprefix("python -m ")) for line in block.splitlines()]


def go_the_way(folder: Path, base: Path) -> None:
    """Lay out what the page asks for, then run its commands in the folder."""
    _models(folder / "models", base)
    _pictures(folder / "pictures")
    (folder / "subjects/ann").mkdir(parents=True)
    draw_person(sample_identity(np.random.default_rng(ANN), "woman", "adult"), "woman")[0].save(
        folder / "subjects/ann/1.png"
    )
    (folder / "subjects/ann/word.txt").write_text("woman")
    (folder / "prompts.txt").write_text("a <subject> on a beach\n")
    content = configuration()
    for section, values in SMALL.items():
        content[section] |= values
    (folder / "mine.yaml").write_text(json.dumps(content))
    before = Path.cwd()
    os.chdir(folder)
    try:
        for module, *arguments in commands():
            added = FEW.get(module.removeprefix("training."), [])
            assert importlib.import_module(module).main([*arguments, *added]) == 0, module
    finally:
        os.chdir(before)


def _models(folder: Path, base: Path) -> None:
    """Under the page's names; CLIP matches phrases, is the image encoder and judges, as there."""
    folder.mkdir(parents=True)
    make_captioner(folder / "blip2-opt-2.7b")
    make_segmenter(folder / "mask2former-swin-large-coco-panoptic")
    make_matcher(folder / "clip-vit-large-patch14")
    make_facenet(folder / "facenet.safetensors")
    (folder / "stable-diffusion-v1-5").write_bytes(base.read_bytes())


def _pictures(folder: Path) -> None:
    """Two people each, as planted_models.py knows them; names as a phone gives them."""
    folder.mkdir()
    for number in range(4):
        picture = Image.new("RGB", (128, 128), (0, 120, 0))
        picture.paste((255, 0, 0), (16, 40 + number, 56, 88))
        picture.paste((0, 0, 255), (72, 32, 112 + number, 80))
        picture.save(folder / f"IMG 00{number} (1).jpg", quality=95)
