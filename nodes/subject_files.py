"""Names of subject files: only what lies in their folders is read or written."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

from ..moa_core.files.whole_file import is_unfinished
from .folders import SUBJECTS, saved_subjects


def subject_names() -> list[str]:
    """Every subject file that the user has."""
    return [name for name in folder_paths.get_filename_list(SUBJECTS) if not is_unfinished(Path(name))]


def find_subject(name: str) -> Path:
    """The file of a name that is in the list. Raises ValueError for any other, and for a link out of its folder."""
    path = folder_paths.get_full_path(SUBJECTS, name) if name in subject_names() else None
    if path is None:
        raise ValueError(
            f"there is no subject '{name}' in models/{SUBJECTS} or in the output folder's {SUBJECTS}. Put the file "
            "into one of them, or save the subject with Save Subject; then press R and choose it here"
        )
    if not any(_inside(path, folder) for folder in folder_paths.get_folder_paths(SUBJECTS)):
        raise ValueError(f"'{name}' is a link to a file outside of {SUBJECTS}. Put the file itself there")
    return Path(path)


def check_prefix(prefix: str) -> None:
    """Raises ValueError for a name that would be written anywhere else."""
    folder = Path(saved_subjects())
    path = folder / prefix.strip()
    if path.resolve() == folder.resolve() or not _inside(path, folder):
        raise ValueError(
            f"filename_prefix is '{prefix}': expected the name of a file in the output folder's {SUBJECTS}, where it "
            "is always written. Enter a name like ann, or family/ann"
        )


def new_subject_path(prefix: str) -> Path:
    """`<prefix>_00001_.safetensors` in the output folder, with a number that no subject of this name has yet.

    Raises ValueError as check_prefix does.
    """
    check_prefix(prefix)
    folder = saved_subjects()
    own, filename, counter, subfolder, _ = folder_paths.get_save_image_path(prefix.strip(), folder)
    name = f"{filename}_{counter:05}_.safetensors"
    while folder_paths.get_full_path(SUBJECTS, os.path.join(subfolder, name)):  # moved into models/, for example
        counter += 1
        name = f"{filename}_{counter:05}_.safetensors"
    return Path(own, name)


def _inside(path: str | Path, folder: str | Path) -> bool:
    return Path(path).resolve().is_relative_to(Path(folder).resolve())
