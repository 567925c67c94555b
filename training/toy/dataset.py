"""Writes the toy world in the layout in which FastComposer published FFHQ, so that one reader reads both.

image_ids.txt, image_ids_train.txt, image_ids_test.txt; per picture, in a folder named after the first five
characters of its id: <id>.jpg, <id>.npy (the map of segment ids, 0 = background) and <id>.json (the caption
and its segments). Every picture follows from (seed, index) alone, so a run may stop and go on at any time.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from moa_core.files.whole_file import write_whole
from toy_world.draw import draw_scene
from toy_world.world import Scene, sample_scene
from training.data.layout import bounding_box, is_written, write_names, write_record

WORLD_VERSION = 1  # raise it when the same scene is drawn differently, so that no folder mixes both
MARK = "toy.json"
BATCH = 100


@dataclass(frozen=True)
class Recipe:
    """What a data set's pictures follow from; it is stored in the folder as `toy.json`."""

    seed: int
    test_share: float
    world_version: int = WORLD_VERSION

    def scene(self, index: int) -> tuple[Scene, bool]:
        """The scene with this index, and whether it belongs to the test split."""
        rng = np.random.default_rng([self.seed, index])
        test = bool(rng.random() < self.test_share)
        return sample_scene(rng, held_out=test), test


def image_id(index: int) -> str:
    return f"{index:08d}"


def render_dataset(out: Path, count: int, seed: int, workers: int = 1, test_share: float = 0.05) -> None:
    """Writes pictures 0 to count - 1 into `out`; what is there already is kept, so a call may be repeated.

    Raises ValueError for a folder that holds something else, or was made with another seed or test share.
    """
    recipe = Recipe(seed, test_share)
    _claim(out, recipe)
    batches = [range(start, min(start + BATCH, count)) for start in range(0, count, BATCH)]
    done, test_ids = 0, []
    for rendered in _run(partial(_render_batch, out, recipe), batches, workers):
        done += rendered[0]
        test_ids += rendered[1]
        print(f"\rrendered {done} of {count}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    write_names(out, (image_id(i) for i in range(count)), test_ids)


def describe(scene: Scene, ids: np.ndarray) -> dict:
    """The record's JSON: caption, segments and, under `toy`, all that generated the picture."""
    segments = []
    for number, (person, (start, end)) in enumerate(zip(scene.people, scene.spans, strict=True), start=1):
        segments.append(
            {
                "id": number,
                "bbox": bounding_box(ids == number),
                "coco_label": "person",
                "word": person.word,
                "start": start,
                "end": end,
            }
        )
    return {"caption": scene.caption, "segments": segments, "toy": scene.attributes()}


def _render_batch(out: Path, recipe: Recipe, indices: range) -> tuple[int, list[str]]:
    """Renders what is missing; returns how many records are there now, and the ids of the test split."""
    test_ids = []
    for index in indices:
        name = image_id(index)
        scene, test = recipe.scene(index)
        if test:
            test_ids.append(name)
        if not is_written(out, name):
            image, ids = draw_scene(scene)
            write_record(out, name, image, ids, describe(scene, ids))
    return len(indices), test_ids


def _run(render, batches: list[range], workers: int) -> Iterator[tuple[int, list[str]]]:
    if workers <= 1:
        yield from map(render, batches)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(render, batches)


def _claim(out: Path, recipe: Recipe) -> None:
    """Makes the folder ours, or says why it cannot be."""
    mark = out / MARK
    if mark.exists():
        there = json.loads(mark.read_text(encoding="utf-8"))
        if there != asdict(recipe):
            raise ValueError(
                f"{out} holds a data set made with {there}; this one would be made with {asdict(recipe)}. "
                "Give the same values to go on with it, or another --out"
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty and holds no toy data set ({MARK} is missing). Give another --out")
    out.mkdir(parents=True, exist_ok=True)
    write_whole(mark, json.dumps(asdict(recipe)).encode())
