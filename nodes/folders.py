"""Where ComfyUI looks for MoA files, and for the toy models that come with the pack."""

import os
from pathlib import Path

import folder_paths

SHIPPED = Path(__file__).resolve().parent.parent / "models"


def add_model_folders() -> None:
    """Register models/moa, for .safetensors files alone, and after the user's folders those of the pack.

    The user's come first: there ComfyUI puts new files, and a file of the same name is taken from there.
    """
    folder = os.path.join(folder_paths.models_dir, "moa")
    paths, _ = folder_paths.folder_names_and_paths.get("moa", ([], set()))
    folder_paths.folder_names_and_paths["moa"] = ([*(p for p in paths if p != folder), folder], {".safetensors"})
    # The folder that other packs for IP-Adapters use: theirs and their kinds of file stay. A .bin is shown, so that the
    # node can say how to make a .safetensors of it.
    own = os.path.join(folder_paths.models_dir, "ipadapter")
    paths, kinds = folder_paths.folder_names_and_paths.get("ipadapter", ([], set()))
    known = [*paths, *([] if own in paths else [own])]
    folder_paths.folder_names_and_paths["ipadapter"] = (known, set(kinds) | {".safetensors", ".bin"})
    for kind in ("checkpoints", "moa"):
        folder_paths.add_model_folder_path(kind, str(SHIPPED / kind))
