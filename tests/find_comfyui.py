"""Finds the ComfyUI that the host tests run in. As a script: prints its folder, or nothing."""

from __future__ import annotations

import os
import re
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent


def find_comfyui() -> Path | None:
    """COMFYUI_PATH; else the ComfyUI that holds this pack in custom_nodes; else comfy-cli's default place."""
    if named := os.environ.get("COMFYUI_PATH"):
        if not is_comfyui(Path(named)):
            raise SystemExit(f"COMFYUI_PATH is '{named}', which holds no main.py and no comfy folder")
        return Path(named).resolve()
    around = Path(os.path.abspath(PACK.parent)).parent
    places = [around] if PACK.parent.name == "custom_nodes" else []
    return next((p for p in [*places, Path.home() / "comfy" / "ComfyUI"] if is_comfyui(p)), None)


def is_comfyui(path: Path) -> bool:
    return (path / "main.py").is_file() and (path / "comfy").is_dir()


def version(comfyui: Path) -> str:
    found = re.search(r'__version__ = "([^"]+)"', (comfyui / "comfyui_version.py").read_text())
    return found[1] if found else "of unknown version"


if __name__ == "__main__":
    print(find_comfyui() or "")
