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
    for kind in ("checkpoints", "moa"):
        folder_paths.add_model_folder_path(kind, str(SHIPPED / kind))
