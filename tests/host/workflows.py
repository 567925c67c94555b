"""The shared workflows, and their API twins made from them."""

from __future__ import annotations

import io
import json
from typing import Any

from PIL import Image

from training.comfyui import PACK, Server

FILES = sorted((PACK / "workflows").glob("*.json"))
NOTES = {"Note", "MarkdownNote"}


def to_api(workflow: dict[str, Any]) -> dict[str, Any]:
    """A workflow in the frontend's format -> what the frontend sends to ComfyUI for it."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    api = {}
    for node in workflow["nodes"]:
        if node["type"] not in NOTES:
            widgets = {k: v for k, v in node.get("widgets_values_named", {}).items() if k != "control_after_generate"}
            wires = {i["name"]: links[i["link"]] for i in node["inputs"] if i.get("link") is not None}
            api[str(node["id"])] = {"class_type": node["type"], "inputs": widgets | wires}
    return api


def pictures_of(server: Server, workflow: dict[str, Any]) -> dict[str, Image.Image]:
    """Run a workflow over the API; the pictures of its output nodes by the nodes' titles."""
    entry = server.queue(to_api(workflow))
    titles = {
        str(node["id"]): node.get("title", node["type"]) for node in workflow["nodes"] if node["type"] not in NOTES
    }
    return {titles[node]: Image.open(io.BytesIO(server.pictures(entry, node)[0])) for node in entry["outputs"]}


def read(path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
