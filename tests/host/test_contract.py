"""Graphs that someone saved go on working: what nodes are called, take and give is frozen, and old graphs run."""

import copy
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from training.comfyui import NAME

HERE = Path(__file__).parent
CONTRACT = json.loads((HERE / "contract.json").read_text(encoding="utf-8"))
"""Every node as saved graphs know it. Entries are never changed or taken out; new ones are appended. A required socket
may become optional, which puts it behind the others: sockets are known by name, widgets by their order."""
OLD_GRAPHS = sorted((HERE / "old_graphs").glob("*.json"))
"""API graphs of the first three templates, as they were sent to ComfyUI by version 0.1.0 of the pack."""
TOLD = ("default", "min", "max", "options", "control_after_generate")
"""What a widget may say of its values; the last is a widget of its own, below it."""


@pytest.fixture(scope="module")
def running(fresh_server) -> dict:
    """The nodes of the running pack, in the contract's form."""
    info = fresh_server.get("/object_info")
    return {name: described(node) for name, node in info.items() if node["python_module"].endswith(NAME)}


def described(node: dict) -> dict:
    """Inputs in the order of their widgets, which is how a saved workflow holds their values."""
    inputs = []
    for group in ("required", "optional"):
        for name, (kind, options) in node["input"].get(group, {}).items():
            told = {key: options[key] for key in TOLD if key in options} | {
                key: options["template"][key] for key in ("prefix", "max") if "template" in options
            }
            inputs.append({"name": name, "type": kind, "optional": group == "optional", **told})
    return {"inputs": inputs, "outputs": node["output"]}


def broken(frozen: dict, now: dict) -> list[str]:
    """What of an input is no longer as it was; wider limits and more options break nothing."""
    grown = {
        "min": lambda old, new: new is None or new <= old,
        "max": lambda old, new: new is None or new >= old,
        "options": lambda old, new: new is not None and new[: len(old)] == old,
    }
    same = {key for key in grown if key not in frozen or grown[key](frozen[key], now.get(key))}
    same |= {key for key in frozen | now if key not in grown and frozen.get(key) == now.get(key)}
    return [f"{key} was {frozen.get(key)!r}, is {now.get(key)!r}" for key in sorted((frozen | now).keys() - same)]


@pytest.mark.parametrize("name", CONTRACT)
def test_a_node_keeps_its_name_its_inputs_in_their_order_and_its_outputs(running, name):
    assert name in running, f"graphs with {name} no longer open"
    frozen, now = CONTRACT[name], running[name]
    assert now["outputs"][: len(frozen["outputs"])] == frozen["outputs"]
    assert [i["name"] for i in now["inputs"]][: len(frozen["inputs"])] == [i["name"] for i in frozen["inputs"]]
    changes = {old["name"]: broken(old, new) for old, new in zip(frozen["inputs"], now["inputs"], strict=False)}
    assert not any(changes.values()), changes


def test_all_that_saved_graphs_can_hold_is_in_the_contract(running):
    """Whoever adds a node, an input, an output or an option appends it to contract.json."""

    def held(nodes: dict) -> dict:
        return {n: ([i["name"] for i in node["inputs"]], node["outputs"]) for n, node in nodes.items()}

    assert held(CONTRACT) == held(running)
    for name, node in CONTRACT.items():
        for frozen, now in zip(node["inputs"], running[name]["inputs"], strict=True):
            assert set(frozen) | {"options"} == set(now) | {"options"}, f"{name}.{frozen['name']}"
            assert "options" not in frozen or frozen["options"] == now["options"], f"{name}.{frozen['name']}"


@pytest.mark.parametrize("path", OLD_GRAPHS, ids=lambda path: path.stem)
def test_an_old_graph_runs_and_draws_its_people(fresh_server, path):
    graph = json.loads(path.read_text(encoding="utf-8"))
    (size,) = {(n["inputs"]["width"], n["inputs"]["height"]) for n in graph.values() if "width" in n["inputs"]}
    others = copy.deepcopy(graph)
    for node in others.values():
        if node["class_type"] == "MoAToySubject":
            node["inputs"]["seed"] += 100
    drawn, changed = saved_pictures(fresh_server, graph), saved_pictures(fresh_server, others)
    assert drawn and all(picture.size == size for picture in drawn.values())
    assert any(drawn[node].tobytes() != changed[node].tobytes() for node in drawn)
    assert "will not appear" not in fresh_server.log.read_text()


def saved_pictures(server, graph: dict) -> dict[str, Image.Image]:
    """The pictures of the SaveImage nodes."""
    entry = server.queue(graph)
    saved = [node for node, content in graph.items() if content["class_type"] == "SaveImage"]
    return {node: Image.open(io.BytesIO(server.pictures(entry, node)[0])) for node in saved}
