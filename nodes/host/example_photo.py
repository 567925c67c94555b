"""A toy person in ComfyUI's input folder, so that the templates for photos run before anybody has chosen one."""

import logging
from pathlib import Path

import folder_paths

from ...moa_core.files.whole_file import whole
from ...toy_world.draw import draw_person
from ...toy_world.world import someone

NAME = "moa-toy-person.png"
WHO, WORD, SIDE = 4, "woman", 512
"""Seed and word of Toy Subject, and the picture's side in pixels."""


def add_example_photo() -> None:
    """Draw the toy person where ComfyUI's Load Image finds it; whatever is there under that name stays.

    A pack's templates bring no pictures along, and ComfyUI refuses a graph whose Load Image names one that is missing.
    """
    photo = Path(folder_paths.get_input_directory()) / NAME
    if photo.exists():
        return
    picture, _ = draw_person(someone(WHO, WORD), WORD, size=SIDE)
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
