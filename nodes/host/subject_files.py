"""Names of subject files: only what lies in their folders is read or written."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path, PurePosixPath

import folder_paths

from ...moa_core.files.whole_file import is_unfinished
from .folders import SUBJECTS, saved_subjects

NOT_IN_NAMES = '<>:"|?*'
"""What Windows has in no file's name; a subject saved elsewhere is to be shared with those who use it."""
DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)
"""Names that are no files there."""
DATE_PARTS = {"y": "%Y", "M": "%m", "d": "%d", "h": "%H", "m": "%M", "s": "%S"}


def subject_names() -> list[str]:
    """Every subject file that the user has."""
    return [name for name in folder_paths.get_filename_list(SUBJECTS) if not is_unfinished(Path(name))]


def find_subject(name: str) -> Path:
    """The file of a name that is in the list, or was in that of another system, which writes \\ for /.

    Raises ValueError for any other, and for a link out of its folder.
    """
    names = subject_names()
    known = {each.replace("\\", "/"): each for each in names} | {each: each for each in names}
    listed = known.get(name, known.get(name.replace("\\", "/")))
    path = None if listed is None else folder_paths.get_full_path(SUBJECTS, listed)
    if path is None:
        raise ValueError(
            f"there is no subject '{name}' in models/{SUBJECTS} or in the output folder's {SUBJECTS}. Put the file "
            "into one of them, or save the subject with Save Subject; then press R and choose it here"
        )
    if not any(_inside(path, folder) for folder in folder_paths.get_folder_paths(SUBJECTS)):
        raise ValueError(f"'{name}' is a link to a file outside of {SUBJECTS}. Put the file itself there")
    return Path(path)


def plain_prefix(prefix: str) -> str:
    """The prefix with / between its folders and today in the place of %date:yyyy-MM-dd%.

    ComfyUI's page writes the date for its own nodes alone; the host does %year% and its kin when it makes the name.
    """
    now = time.localtime()

    def part(found: re.Match) -> str:
        text = time.strftime(DATE_PARTS[found[0][0]], now)
        if found[0][0] == "y":
            return text if len(found[0]) > 2 else text[-2:]
        return str(int(text)).zfill(len(found[0]))

    dated = re.sub("%date:(.*?)%", lambda found: re.sub("yyy?y?|MM?|dd?|hh?|mm?|ss?", part, found[1]), prefix)
    return dated.replace("\\", "/").strip()


def check_prefix(prefix: str) -> None:
    """Raises ValueError for a name that would be written anywhere else, or that not every system can have."""
    folder, plain = Path(saved_subjects()), plain_prefix(prefix)
    path = folder / plain
    if path.resolve() == folder.resolve() or not _inside(path, folder):
        raise ValueError(
            f"filename_prefix is '{prefix}': expected the name of a file in the output folder's {SUBJECTS}, where it "
            "is always written. Enter a name like ann, or family/ann"
        )
    for part in PurePosixPath(plain).parts:
        wrong = sorted({c for c in part if c in NOT_IN_NAMES or ord(c) < 32})
        if part != ".." and (wrong or part[-1] in ". " or DEVICES.match(part)):
            raise ValueError(
                f"filename_prefix is '{prefix}': Windows can have no file called '{part}'"
                f"{' (' + ' '.join(map(repr, wrong)) + ')' if wrong else ''}. Enter a name of letters, digits, - and _"
            )


def new_subject_path(prefix: str) -> Path:
    """`<prefix>_00001_.safetensors` in the output folder, with a number that no subject of this name has yet.

    Raises ValueError as check_prefix does.
    """
    check_prefix(prefix)
    folder = saved_subjects()
    own, filename, counter, subfolder, _ = folder_paths.get_save_image_path(plain_prefix(prefix), folder)
    name = f"{filename}_{counter:05}_.safetensors"
    while folder_paths.get_full_path(SUBJECTS, os.path.join(subfolder, name)):  # moved into models/, for example
        counter += 1
        name = f"{filename}_{counter:05}_.safetensors"
    return Path(own, name)


def _inside(path: str | Path, folder: str | Path) -> bool:
    return Path(path).resolve().is_relative_to(Path(folder).resolve())
