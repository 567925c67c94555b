"""Blueprints: subgraphs that ComfyUI offers like nodes."""

import io
import json

import pytest
from PIL import Image
from test_http import node

from toy_world.shape import IMAGE_SIZE
from training.comfyui import NAME, PACK, find_comfyui, version
from training.comfyui.templates import to_api

BLUEPRINTS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (PACK / "subgraphs").glob("*.json")}
INPUTS, OUTPUTS = -10, -20
"""Ids that a subgraph's links give to the subgraph itself."""


def inside(name: str) -> dict:
    (subgraph,) = BLUEPRINTS[name]["definitions"]["subgraphs"]
    return subgraph


def test_the_host_lists_and_serves_every_blueprint(fresh_server):
    listed = {
        entry["name"]: number
        for number, entry in fresh_server.get("/global_subgraphs").items()
        if entry["info"]["node_pack"].endswith(NAME)
    }
    assert sorted(listed) == sorted(BLUEPRINTS) == ["Couple in a Scene (MoA)", "Photo to Subject (MoA)"]
    for name, number in listed.items():
        assert json.loads(fresh_server.get(f"/global_subgraphs/{number}")["data"]) == BLUEPRINTS[name]


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_its_nodes_are_the_hosts_or_ours_or_say_which_comfyui_has_them(fresh_server, name):
    info = fresh_server.get("/object_info")
    running = tuple(map(int, version(find_comfyui()).split(".")))
    for part in inside(name)["nodes"]:
        if part["type"] not in info:
            needed = tuple(map(int, part["properties"]["ver"].split(".")))
            assert part["properties"]["cnr_id"] == "comfy-core" and needed > running, part["type"]
            continue
        known = [key for group in ("required", "optional") for key in info[part["type"]]["input"].get(group, {})]
        assert {slot["name"].split(".")[0] for slot in part["inputs"]} == set(known)
        assert [slot["type"] for slot in part["outputs"]] == info[part["type"]]["output"]


@pytest.mark.parametrize("name", BLUEPRINTS)
def test_its_links_join_slots_of_one_type(name):
    subgraph = inside(name)
    nodes = {part["id"]: part for part in subgraph["nodes"]}
    for link in subgraph["links"]:
        source = subgraph["inputs"] if link["origin_id"] == INPUTS else nodes[link["origin_id"]]["outputs"]
        target = subgraph["outputs"] if link["target_id"] == OUTPUTS else nodes[link["target_id"]]["inputs"]
        ends = source[link["origin_slot"]], target[link["target_slot"]]
        assert {end["type"] for end in ends} == {link["type"]}
        assert link["id"] in ends[0].get("links", ends[0].get("linkIds"))
        assert link["id"] in (ends[1].get("link"), *ends[1].get("linkIds", []))
    (outer,) = BLUEPRINTS[name]["nodes"]
    for side in ("inputs", "outputs"):
        slots = [[(slot["name"], slot["type"]) for slot in graph[side]] for graph in (outer, subgraph)]
        assert slots[0] == slots[1]


def flat(name: str, given: dict, info: dict) -> tuple[dict, dict]:
    """A blueprint's nodes as an API graph, with values or wires given for its inputs; its outputs' wires by name."""
    subgraph = inside(name)
    links = [[link["id"], link["origin_id"], link["origin_slot"]] for link in subgraph["links"]]
    outer = {link["id"] for link in subgraph["links"] if link["origin_id"] == INPUTS}
    nodes = [
        part | {"inputs": [slot | ({"link": None} if slot["link"] in outer else {}) for slot in part["inputs"]]}
        for part in subgraph["nodes"]
    ]
    api = to_api({"nodes": nodes, "links": links}, info)
    names = {part["id"]: [slot["name"] for slot in part["inputs"]] for part in nodes}
    outputs = {}
    for link in subgraph["links"]:
        if link["origin_id"] == INPUTS and (key := subgraph["inputs"][link["origin_slot"]]["name"]) in given:
            api[str(link["target_id"])]["inputs"][names[link["target_id"]][link["target_slot"]]] = given[key]
        if link["target_id"] == OUTPUTS:
            outputs[subgraph["outputs"][link["target_slot"]]["name"]] = [str(link["origin_id"]), link["origin_slot"]]
    return api, outputs


def test_a_couple_in_a_scene_draws_both(fresh_server):
    people = {
        f"{kind}{number}": part
        for number, word in enumerate(("man", "woman"))
        for kind, part in {
            "toy": node("MoAToySubject", seed=number, pose="standing", word=word),
            "subject": node(
                "MoASubjectEncoder", moa=["moa", 0], image=[f"toy{number}", 0], mask=[f"toy{number}", 1], word=word
            ),
        }.items()
    }
    outside = people | {
        "base": node("CheckpointLoaderSimple", ckpt_name="moa-toy-base.safetensors"),
        "moa": node("MoALoader", moa_name="moa-toy.safetensors"),
    }
    given = {"model": ["base", 0], "clip": ["base", 1], "vae": ["base", 2], "moa": ["moa", 0], "width": IMAGE_SIZE}
    given |= {"height": IMAGE_SIZE, "steps": 4, "text": "a man and a woman in a forest"}
    given |= {"subject_a": ["subject0", 0], "subject_b": ["subject1", 0]}
    api, outputs = flat("Couple in a Scene (MoA)", given, fresh_server.get("/object_info"))
    graph = api | outside | {"save": node("SaveImage", images=outputs["IMAGE"], filename_prefix="couple")}
    graph["maps"] = node("MoARouterVisualizer", model=outputs["MODEL"], samples=outputs["LATENT"])
    graph["shown"] = node("PreviewImage", images=["maps", 0])
    drawn = [picture(fresh_server, graph)]
    for person in ("toy0", "toy1"):
        other = graph | {person: graph[person] | {"inputs": graph[person]["inputs"] | {"seed": 50}}}
        drawn.append(picture(fresh_server, other))
    assert all(image.size == (IMAGE_SIZE, IMAGE_SIZE) for image in drawn)
    assert len({image.tobytes() for image in drawn}) == 3


def picture(server, graph: dict) -> Image.Image:
    return Image.open(io.BytesIO(server.pictures(server.queue(graph), "save")[0]))
