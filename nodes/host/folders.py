"""Where ComfyUI looks for MoA files and subjects, and for the toy models that come with the pack."""

import os
import re
from pathlib import Path

import folder_paths

SHIPPED = Path(__file__).resolve().parents[2] / "models"
KINDS = ("checkpoints", "moa", "controlnet", "loras")
"""Of the toy models there."""
SUBJECTS = "moa_subjects"
"""Folder of subject files, among the models and in the output folder."""


def add_model_folders() -> None:
    """Register models/moa and models/moa_subjects, for .safetensors files alone, and after the user's folders others.

    Those are the pack's own, and where Save Subject writes. The user's come first: there ComfyUI puts new files, and a
    file of the same name is taken from there.
    """
    for kind in ("moa", SUBJECTS):
        folder = os.path.join(folder_paths.models_dir, kind)
        paths, _ = folder_paths.folder_names_and_paths.get(kind, ([], set()))
        folder_paths.folder_names_and_paths[kind] = ([*(p for p in paths if p != folder), folder], {".safetensors"})
    folder_paths.add_model_folder_path(SUBJECTS, saved_subjects())
    # The folder that other packs for IP-Adapters use: theirs and their kinds of file stay. FaceID files are .bin.
    own = os.path.join(folder_paths.models_dir, "ipadapter")
    paths, kinds = folder_paths.folder_names_and_paths.get("ipadapter", ([], set()))
    known = [*paths, *([] if own in paths else [own])]
    folder_paths.folder_names_and_paths["ipadapter"] = (known, set(kinds) | {".safetensors", ".bin"})
    for kind in KINDS:
        folder_paths.add_model_folder_path(kind, str(SHIPPED / kind))


def ip_adapter_files() -> list[str]:
    """What MoA From IP-Adapter lists: the kinds of file that it reads, those that fit the usual names first.

    A FaceID file's LoRA, which other packs load by itself, is no IP-Adapter.
    """
    names = [name for name in folder_paths.get_filename_list("ipadapter") if name.endswith((".safetensors", ".bin"))]
    usual = re.compile(r"ip-?adapter.*(sd15|sdxl)", re.IGNORECASE)
    return sorted(
        (name for name in names if not re.search(r"faceid.*_lora\.safetensors$", name, re.IGNORECASE)),
        key=lambda name: (usual.search(name) is None, name.lower()),
    )


def saved_subjects() -> str:
    """Where Save Subject writes."""
    return os.path.join(folder_paths.get_output_directory(), SUBJECTS)
