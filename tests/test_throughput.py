"""The measurement of a step, at the toy's size."""

import json

import pytest

from toy_world.shape import IMAGE_ENCODER
from training.host.toy_base import random_toy
from training.throughput import IMAGES, main


def test_every_setting_is_measured_and_the_whole_run_follows_from_the_best(capsys):
    toy = random_toy(0)
    assert main(["--batches", "1", "--steps", "1", "--json"], lambda: (toy, toy.fresh_moa(IMAGE_ENCODER))) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    rows = {(row["checkpointing"], row["cached_latents"]): row for row in found["rows"]}
    assert len(rows) == 4 and all(row["peak_gib"] > 0 and row["utilisation"] > 0 for row in rows.values())
    flops = {setting: row["tflop"] for setting, row in rows.items()}
    assert flops[True, True] > 1.1 * flops[False, True]  # checkpointing computes the forward twice
    assert flops[False, False] > flops[False, True]  # the autoencoder's share
    assert found["hours"] == pytest.approx(IMAGES / max(row["images_per_s"] for row in rows.values()) / 3600)
    assert len(printed.err.splitlines()) == 7
