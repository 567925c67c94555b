"""The shared workflows, and their API twins made from them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

from PIL import Image, ImageSequence

from training.comfyui.server import PACK, Server

FOLDER = PACK / "workflows"
ENDING = " (MoA)"
"""Of every template's file name: ComfyUI's search of templates stops where two packs have files of one name."""
NAMES = sorted(path.stem.removesuffix(ENDING) for path in FOLDER.glob(f"*{ENDING}.json"))
NOTES = {"Note", "MarkdownNote"}
FOR_A_PHOTO = ("Your photo, your checkpoint", "Two photos, your checkpoint", "Your photo, your SDXL checkpoint")
NEEDS_FILES = {"Your LoRAs, your checkpoint", *FOR_A_PHOTO}
"""Workflows for files that everybody has to bring along; those for photos and an IP-Adapter, SD 1.5 and SDXL."""
RUNNING = [name for name in NAMES if name not in NEEDS_FILES]
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


def read(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}{ENDING}.json").read_text(encoding="utf-8"))


def to_api(workflow: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """A workflow as the frontend saves it -> what the frontend sends to ComfyUI for it."""
    links = {number: [str(node), slot] for number, node, slot, *_ in workflow["links"]}
    api = {}
    for node in workflow["nodes"]:
        if node["type"] not in NOTES:
            widgets = dict(_widgets(node, object_info[node["type"]]["input"]))
            wires = {i["name"]: links[i["link"]] for i in node["inputs"] if i.get("link") is not None}
            api[str(node["id"])] = {"class_type": node["type"], "inputs": widgets | wires}
    return api


def _widgets(node: dict[str, Any], inputs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The widgets' values by name; they are stored in the order of the node's inputs."""
    values = iter(node.get("widgets_values", []))
    saved = len(node.get("widgets_values", []))
    for group in ("required", "optional"):
        for name, (kind, *options) in inputs.get(group, {}).items():
            if isinstance(kind, list) or kind in WIDGETS:
                if group == "optional" and saved == 0:
                    return  # saved before the pack had this widget: the frontend leaves its default
                yield name, next(values)
                saved -= 1
                if options and options[0].get("control_after_generate"):
                    next(values)  # the widget below it: fixed, increment, randomize
                    saved -= 1


def saved_by(name: str, server: Server) -> dict[str, list[Image.Image]]:
    """The pictures that a shared workflow saves, by their nodes' titles, in the order of its nodes."""
    return saved(name, pictures_of(name, server))


def saved(name: str, shown: dict[str, list[Image.Image]]) -> dict[str, list[Image.Image]]:
    """Of the pictures of a shared workflow those that it saves."""
    savers = [node for node in read(name)["nodes"] if node["type"].startswith("Save")]
    return {node["title"]: shown[node["title"]] for node in savers}


def pictures_of(name: str, server: Server, api: dict[str, Any] | None = None) -> dict[str, list[Image.Image]]:
    """Run a shared workflow, or what a test made of its API twin; the pictures of each output node by its title."""
    workflow = read(name)
    graph = api or to_api(workflow, server.get("/object_info"))
    for node in graph.values():
        if node["class_type"].startswith("Save"):  # older ComfyUIs do not name what another workflow just saved alike
            node["inputs"]["filename_prefix"] = name
    entry = server.queue(graph)
    titles = {str(node["id"]): node.get("title", node["type"]) for node in workflow["nodes"]}
    painted = [node for node, out in entry["outputs"].items() if "images" in out]  # others show a text
    shown = {titles.get(node, node): server.pictures(entry, node) for node in painted}
    return {title: [p for file in files for p in _frames(file)] for title, files in shown.items()}


def _frames(file: bytes) -> list[Image.Image]:
    """A picture, or those of an animation."""
    return [frame.convert("RGB") for frame in ImageSequence.Iterator(Image.open(io.BytesIO(file)))]
