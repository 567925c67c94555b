"""`make demo`: what MoA does, on one sheet, with the toy models that come with the pack; `--all`: every application.

Through a real ComfyUI where there is one, through the diffusers pipeline otherwise; the pictures are the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from training.comfyui import PACK, Server, find_comfyui, make_base_directory, version
from training.comfyui.templates import NAMES, NEEDS_FILES
from training.demo.painters import ComfyUIPainter, DiffusersPainter, Painter
from training.demo.sheet import draw_application, draw_demo

OUTPUT = PACK / "output"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="a sheet for each of the shared workflows")
    whole = parser.parse_args().all
    OUTPUT.mkdir(exist_ok=True)
    with painter_at_hand() as painter:
        if whole:
            draw_all(painter)
        else:
            draw_demo(painter).save(OUTPUT / "contact_sheet.png")
            print(f"Contact sheet: {OUTPUT / 'contact_sheet.png'}")


def draw_all(painter: Painter) -> None:
    for name in NAMES:
        shown = "it is for files of your own" if name in NEEDS_FILES else painter.show(name)
        if isinstance(shown, str):
            print(f"{name}: not drawn: {shown}")
            continue
        path = OUTPUT / "applications" / f"{name}.jpg"
        path.parent.mkdir(exist_ok=True)
        draw_application(name, shown).save(path, quality=90)
        print(f"{name}: {path}", flush=True)


@contextmanager
def painter_at_hand() -> Iterator[Painter]:
    comfyui = find_comfyui()
    if comfyui is None:
        print("No ComfyUI found: sampling through the diffusers pipeline.")
        yield DiffusersPainter(PACK / "models")
    else:
        print(f"Sampling in ComfyUI {version(comfyui)} ({comfyui}).")
        with Server(comfyui, make_base_directory(OUTPUT / "comfyui")) as server:
            yield ComfyUIPainter(server)


if __name__ == "__main__":
    main()
