"""The model files that a graph uses, by name and hash."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import folder_paths

from ...moa_core.files.fingerprint import file_hash
from ..host.folders import SUBJECTS

MODEL_FILES = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
NO_MODELS = {"custom_nodes", "configs"}
UNNAMED = "(a saved subject)"
"""People give these files names of people."""


def used_files(graph: dict[str, Any] | None, node: str | None) -> list[dict[str, str]]:
    """Kind, name and SHA-256 of every model file that an API graph names in a node or before it. No folders.

    None, where ComfyUI does not say what graph it runs, gives none.
    """
    found = {}
    for value in _texts_before(graph or {}, node):
        if value.lower().endswith(MODEL_FILES):
            for kind in folder_paths.folder_names_and_paths.keys() - NO_MODELS:
                path = folder_paths.get_full_path(kind, value)
                if path is not None:
                    found[os.path.realpath(path)] = kind
    files = []
    for path, kind in found.items():
        about = os.stat(path)
        name = UNNAMED if kind == SUBJECTS else Path(path).name
        files.append({"kind": kind, "name": name, "sha256": _hash(path, about.st_size, about.st_mtime_ns)})
    return sorted(files, key=lambda file: (file["kind"], file["name"]))


def _texts_before(graph: dict[str, Any], node: str | None) -> Iterator[str]:
    """The texts in the widgets of a node and of all whose outputs it is made from."""
    waiting, seen = [node], set()
    while waiting:
        number = waiting.pop()
        if number in seen or number not in graph:
            continue
        seen.add(number)
        for value in graph[number]["inputs"].values():
            if isinstance(value, str):
                yield value
            elif isinstance(value, list) and len(value) == 2:
                waiting.append(value[0])


@lru_cache(maxsize=64)
def _hash(path: str, size: int, changed: int) -> str:
    """Once for as long as the file stays as it is: a checkpoint takes some seconds."""
    return file_hash(Path(path))
