"""A long day of one server: `make soak`. Not part of `make test`."""

import random
import statistics

import psutil
import pytest
from test_http import graph, person
from toy_models import SHIPPED

from training.comfyui import PACK, Server, find_comfyui, make_base_directory

PROMPTS = 100
SIZES = ((128, 128, 1), (192, 128, 1), (128, 192, 2), (96, 160, 3))
"""Width, height, pictures."""


@pytest.mark.slow
def test_a_hundred_prompts_leave_memory_flat_and_the_log_without_a_traceback(tmp_path):
    base, dice, resident = make_base_directory(tmp_path), random.Random(0), []
    people = [person(base / f"input/person{number}.png", number) for number in range(6)]
    checkpoint, moa = (path.rsplit("/", 1)[-1] for path in SHIPPED)
    assert all((PACK / "models" / path).is_file() for path in SHIPPED)
    with Server(find_comfyui(), base) as server:
        process = psutil.Process(server.process.pid)
        for number in range(PROMPTS):
            words = dice.choice([["man"], ["woman"], ["man", "woman"], ["woman", "man", "man"]])
            chosen = list(zip(dice.choices(people, k=len(words)), words, strict=True))
            workflow = graph(checkpoint, moa, chosen, "a man, a woman and a man on a beach", seed=number)
            patch, latent = workflow["patch"]["inputs"], workflow["latent"]["inputs"]
            patch["strength"], patch["routing"] = dice.choice([0.0, 0.5, 1.0, 1.5]), dice.choice(["sparse", "dense"])
            latent["width"], latent["height"], latent["batch_size"] = dice.choice(SIZES)
            workflow["sample"]["inputs"]["steps"] = 4
            if patch["strength"] == 0.0:  # the plain checkpoint has no maps to show
                del workflow["visualize"], workflow["maps"]
            server.queue(workflow)
            resident.append(process.memory_info().rss / 2**20)
        log = server.log.read_text()
    fifth = PROMPTS // 5
    early, late = (statistics.median(part) for part in (resident[fifth : 2 * fifth], resident[-fifth:]))
    print(f"resident memory, MiB: {early:.0f} in the second fifth of the prompts, {late:.0f} in the last")
    assert "Traceback" not in log
    assert late <= 1.05 * early
