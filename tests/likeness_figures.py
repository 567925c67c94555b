"""`python -m tests.likeness_figures [batches]`: does MoA Report order pictures as the judges of the toy world do?

Batches of four pictures of one person, in a real ComfyUI: how often, of two pictures of a batch in which the judges
recognise more and less of the person, the report's likeness says the same; and what is recognised in the report's best
picture, beside all pictures.
"""

from __future__ import annotations

import io
import itertools
import json
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

from tests.host.judged import look
from toy_world.world import ACTIONS, PLACES, Identity, someone
from training.comfyui import Server, find_comfyui, make_base_directory
from training.comfyui.templates import read, to_api
from training.toy.renders import IDENTITY

STRENGTHS = (1.0, 0.5)
"""In turn: at full strength there is little left to order."""
FIRST_PERSON, FIRST_SEED = 500, 900


def main(batches: int) -> None:
    agree, pairs, best, all_of_them = 0, 0, [], []
    with tempfile.TemporaryDirectory() as folder:
        base = make_base_directory(Path(folder))
        with Server(find_comfyui(), base) as server:
            for number in range(batches):
                likeness, right, chosen = judged_batch(server, base, number)
                for a, b in itertools.combinations(range(len(right)), 2):
                    if right[a] != right[b]:
                        pairs += 1
                        agree += (right[a] > right[b]) == (likeness[a] > likeness[b])
                best.append(right[chosen - 1])
                all_of_them += right
                mean, mean_best = sum(all_of_them) / len(all_of_them), sum(best) / len(best)
                print(
                    f"{number + 1} batches: {agree} of {pairs} pairs, identity {mean:.3f}, best {mean_best:.3f}",
                    flush=True,
                )


def judged_batch(server: Server, base: Path, number: int) -> tuple[list[float], list[float], int]:
    """Likeness and judged identity of each picture of a batch, and the report's best one's number."""
    word, strength = ("man", "woman")[number % 2], STRENGTHS[number // 2 % 2]
    action, place = ACTIONS[number % len(ACTIONS)], list(PLACES.values())[number % len(PLACES)]
    action = "standing" if action == "riding a bike" else action
    workflow = read("Check my files")
    api = to_api(workflow, server.get("/object_info"))
    node = {n.get("title", n["type"]): str(n["id"]) for n in workflow["nodes"]}
    api[node["Prompt"]]["inputs"]["text"] = f"a portrait of a {word} {action} {place}"
    api[node["Seed"]]["inputs"]["value"] = FIRST_SEED + number
    api[node["EmptyLatentImage"]]["inputs"]["batch_size"] = 4
    api[node["MoAPatchModel"]]["inputs"]["strength"] = strength
    api[node["MoAToySubject"]]["inputs"].update(seed=FIRST_PERSON + number, word=word)
    api[node["MoASubjectEncoder"]]["inputs"]["word"] = word
    api[node["With MoA: sampling"]]["inputs"]["steps"] = 12
    with_moa = api[node["MoAReport"]]["inputs"]["image"]
    api[node["MoAReport"]]["inputs"]["image_without"] = with_moa  # likeness needs no other
    del api[node["Without MoA"]]  # and so nothing samples without
    entry = server.queue(api)
    told = json.loads(max((base / "output").glob("MoA_report_*.json")).read_text(encoding="utf-8"))
    pictures = [Image.open(io.BytesIO(file)) for file in server.pictures(entry, node["With MoA"])]
    likeness = [picture["subjects"][0]["likeness"] or -1.0 for picture in told["pictures"]]
    return likeness, identity(pictures, someone(FIRST_PERSON + number, word)), told["best"]


def identity(pictures: list[Image.Image], who: Identity) -> list[float]:
    """The share of what makes up the person that the judges recognise in each picture."""
    seen = look(pictures)[0]
    right = [seen[name].argmax(dim=1) == IDENTITY[name].index(vars(who)[name]) for name in IDENTITY]
    return torch.stack(right).float().mean(dim=0).tolist()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 32)
