"""People to evaluate with: a folder for each, with reference pictures, and perhaps masks and a word."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from training.data import pictures
from training.data.pictures import ENDINGS
from training.evaluation.fingerprint import fingerprint

MASK = ".mask.png"
WORD_FILE, WORD = "word.txt", "person"


@dataclass(frozen=True, eq=False)
class ReferencePerson:
    """Reference pictures, in RGB, under their files; masks [H, W] of the person in 0..1, None for a whole picture."""

    name: str
    word: str
    pictures: dict[Path, Image.Image]
    masks: list[Tensor | None]

    @property
    def pixels(self) -> list[Tensor]:
        """[H, W, 3] in 0..1 each."""
        return [torch.from_numpy(np.array(picture)).float() / 255 for picture in self.pictures.values()]

    @cached_property
    def fingerprint(self) -> str:
        """Of everything but the name."""
        return f"{self.word} {fingerprint(*self.pixels, *(mask for mask in self.masks if mask is not None))}"


def read_people(folder: Path, words: dict[str, str] | None = None, all_pictures: bool = False) -> list[ReferencePerson]:
    """One person for each folder in `folder`, sorted by name. Raises ValueError for what cannot be used.

    words: those of the people to read, by their folders, which then must be there; None: all there are.
    all_pictures: not the first of each alone.
    """
    if not folder.is_dir():
        raise ValueError(f"--subjects: {folder} is no folder; expected one that holds a folder for each subject")
    folders = sorted(path for path in folder.iterdir() if path.is_dir())
    if words is not None:
        if missing := sorted(words.keys() - {path.name for path in folders}):
            raise ValueError(
                f"--subjects: {folder} lacks {len(missing)} of the {len(words)} subjects that --prompts lists: "
                f"{', '.join(missing[:3])}"
            )
        folders = [path for path in folders if path.name in words]
    if not folders:
        raise ValueError(f"--subjects: {folder} holds no folder; expected one for each subject, with its pictures")
    return [_read_person(path, (words or {}).get(path.name), all_pictures) for path in folders]


def _read_person(folder: Path, word: str | None, all_pictures: bool) -> ReferencePerson:
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in ENDINGS and not p.name.endswith(MASK))
    if not files:
        raise ValueError(f"{folder} holds no picture of the subject ({', '.join(sorted(ENDINGS))})")
    pictures = {path: read_picture(path) for path in (files if all_pictures else files[:1])}
    masks = [_read_mask(path, picture.size) for path, picture in pictures.items()]
    return ReferencePerson(folder.name, word or _read_word(folder / WORD_FILE), pictures, masks)


def _read_word(path: Path) -> str:
    word = path.read_text(encoding="utf-8").strip() if path.exists() else WORD
    if not word.isalpha():
        raise ValueError(f"{path} must hold one word that the subject stands for, such as man; found '{word}'")
    return word


def _read_mask(picture: Path, size: tuple[int, int]) -> Tensor | None:
    path = picture.with_name(picture.stem + MASK)
    if not path.exists():
        return None
    mask = read_picture(path, "L")
    if mask.size != size:
        raise ValueError(
            f"{path} is {mask.width}x{mask.height} pixels, its picture {size[0]}x{size[1]}: make them equal"
        )
    return torch.from_numpy(np.array(mask)).float() / 255


def read_picture(path: Path, mode: str = "RGB") -> Image.Image:
    """A picture as pictures.read_picture reads it. Raises ValueError for one that cannot be read."""
    try:
        return pictures.read_picture(path).convert(mode)
    except pictures.UNREADABLE as error:
        raise ValueError(f"{path} cannot be read as a picture ({error}): replace or remove it") from error
