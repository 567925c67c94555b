"""Where ComfyUI looks for MoA files."""

import os

import folder_paths


def add_moa_folder() -> None:
    """Register models/moa, for .safetensors files alone, beside folders that extra_model_paths.yaml names."""
    folder = os.path.join(folder_paths.models_dir, "moa")
    paths, _ = folder_paths.folder_names_and_paths.get("moa", ([], set()))
    folder_paths.folder_names_and_paths["moa"] = ([*(p for p in paths if p != folder), folder], {".safetensors"})
