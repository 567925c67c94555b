"""Picture files as a user has them."""

from __future__ import annotations

import logging
from pathlib import Path

from PIL import Image
from torch.utils.data import Dataset

log = logging.getLogger(__name__)

ENDINGS = {".jpg", ".jpeg", ".png", ".webp"}


class PictureFiles(Dataset):
    """(name, picture) of every file; None for one that cannot be read."""

    def __init__(self, files: dict[str, Path]):
        self.files = list(files.items())

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[str, Image.Image | None]:
        name, path = self.files[index]
        try:
            return name, Image.open(path).convert("RGB")
        except (OSError, SyntaxError) as error:
            log.warning("skipping %s: %s", path, error)
            return name, None


def find_pictures(folder: Path) -> dict[str, Path]:
    """Every picture in the folder and below, under the name of its record."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)
    if not paths:
        raise ValueError(f"{folder} holds no picture ({', '.join(sorted(ENDINGS))})")
    files: dict[str, Path] = {}
    for path in paths:
        name = "_".join(path.relative_to(folder).with_suffix("").parts)
        if name in files:
            raise ValueError(f"{path} and {files[name]} would both become record '{name}': rename one of them")
        files[name] = path
    return files
