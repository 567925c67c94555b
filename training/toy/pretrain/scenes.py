"""The scenes that the toy base model and what goes with it learn from, drawn once into the run folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from toy_world.draw import draw_scene
from toy_world.world import Scene, sample_scene
from training.toy.dataset import WORLD_VERSION
from training.toy.pretrain.loop import Plan


@dataclass(frozen=True)
class RenderedScenes:
    """pixels: uint8 [N, H, W, C] on disk; captions: N texts; recipe: what they follow from."""

    pixels: np.ndarray
    captions: list[str]
    recipe: dict[str, int]


Paint = Callable[[Scene, int], np.ndarray]
"""A scene and its size in pixels -> uint8 [size, size, C]; a module's function, as other processes call it."""


def picture(scene: Scene, size: int) -> np.ndarray:
    """What the base model learns from."""
    return np.asarray(draw_scene(scene, size)[0])


def rendered(plan: Plan, size: int, paint: Paint = picture) -> RenderedScenes:
    """The scenes of the plan, painted into the run folder unless they are there."""
    plan.run.mkdir(parents=True, exist_ok=True)
    pixels, info = plan.run / f"{paint.__name__}s.npy", plan.run / f"{paint.__name__}s.json"
    recipe = {"seed": plan.seed, "scenes": plan.scenes, "world_version": WORLD_VERSION, "size": size}
    if not info.exists() or json.loads(info.read_text(encoding="utf-8"))["recipe"] != recipe:
        info.unlink(missing_ok=True)
        captions = _render(pixels, plan, size, paint)
        info.write_text(json.dumps({"recipe": recipe, "captions": captions}), encoding="utf-8")
    return RenderedScenes(np.load(pixels, mmap_mode="r"), **json.loads(info.read_text(encoding="utf-8")))


def _render(path: Path, plan: Plan, size: int, paint: Paint) -> list[str]:
    captions, out = [], None
    with ProcessPoolExecutor(plan.workers) as pool:
        drawn = pool.map(partial(_paint, plan.seed, size, paint), range(plan.scenes), chunksize=64)
        for i, (painted, caption) in enumerate(tqdm(drawn, total=plan.scenes, desc="rendering", unit="picture")):
            if out is None:
                out = np.lib.format.open_memmap(path, "w+", np.uint8, (plan.scenes, *painted.shape))
            out[i] = painted
            captions.append(caption)
    out.flush()
    return captions


def _paint(seed: int, size: int, paint: Paint, index: int) -> tuple[np.ndarray, str]:
    """A scene without held-out people, which are kept for measuring."""
    scene = sample_scene(np.random.default_rng([seed, index]))
    return paint(scene, size), scene.caption
