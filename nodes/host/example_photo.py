"""Toy people in ComfyUI's input folder, so that the templates for photos run before anybody has chosen one."""

import logging
from pathlib import Path

import folder_paths

from ...moa_core.files.whole_file import whole
from ...toy_world.draw import draw_person
from ...toy_world.world import someone

PHOTOS = {"moa-toy-person.png": (4, "woman"), "moa-toy-man.png": (14, "man")}
"""Names of the pictures; seed and word of Toy Subject."""
SIDE = 512
"""Of a picture, in pixels."""


def add_example_photos() -> None:
    """Draw toy people where ComfyUI's Load Image finds them; whatever is there under their names stays.

    A pack's templates bring no pictures along, and ComfyUI refuses a graph whose Load Image names one that is missing.
    """
    for name, (seed, word) in PHOTOS.items():
        photo = Path(folder_paths.get_input_directory()) / name
        if not photo.exists():
            _draw(photo, seed, word)


def _draw(photo: Path, seed: int, word: str) -> None:
    picture, _ = draw_person(someone(seed, word), word, size=SIDE)
    try:
        with whole(photo) as unfinished:
            picture.save(unfinished, "PNG")
    except OSError as error:
        logging.warning(
            "MoA: the example picture for the templates could not be saved as %s (%s). Choose a photo of your own in "
            "their Load Image before you press Run",
            photo,
            error,
        )
