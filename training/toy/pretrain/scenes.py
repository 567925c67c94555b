"""The scenes that the toy base model learns from, drawn once into the run folder."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from toy_world.draw import draw_scene
from toy_world.world import sample_scene
from training.toy.dataset import WORLD_VERSION
from training.toy.pretrain.loop import Plan


@dataclass(frozen=True)
class RenderedScenes:
    """pixels: uint8 [N, H, W, 3] on disk; captions: N texts; recipe: what they follow from."""

    pixels: np.ndarray
    captions: list[str]
    recipe: dict[str, int]


def rendered(plan: Plan, size: int) -> RenderedScenes:
    """The scenes of the plan, drawn into the run folder unless they are there."""
    plan.run.mkdir(parents=True, exist_ok=True)
    pixels, info = plan.run / "pictures.npy", plan.run / "pictures.json"
    recipe = {"seed": plan.seed, "scenes": plan.scenes, "world_version": WORLD_VERSION, "size": size}
    if not info.exists() or json.loads(info.read_text())["recipe"] != recipe:
        info.unlink(missing_ok=True)
        captions = _render(pixels, plan, size)
        info.write_text(json.dumps({"recipe": recipe, "captions": captions}))
    return RenderedScenes(np.load(pixels, mmap_mode="r"), **json.loads(info.read_text()))


def _render(path: Path, plan: Plan, size: int) -> list[str]:
    out = np.lib.format.open_memmap(path, "w+", np.uint8, (plan.scenes, size, size, 3))
    captions = []
    with ProcessPoolExecutor(plan.workers) as pool:
        drawn = pool.map(partial(_draw, plan.seed, size), range(plan.scenes), chunksize=64)
        for i, (picture, caption) in enumerate(tqdm(drawn, total=plan.scenes, desc="rendering", unit="picture")):
            out[i] = picture
            captions.append(caption)
    out.flush()
    return captions


def _draw(seed: int, size: int, index: int) -> tuple[np.ndarray, str]:
    """A scene without held-out people, which are kept for measuring."""
    scene = sample_scene(np.random.default_rng([seed, index]))
    return np.asarray(draw_scene(scene, size)[0]), scene.caption
