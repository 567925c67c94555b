"""`make demo`: what MoA does, on one sheet, with the toy models that come with the pack.

Through a real ComfyUI where there is one, through the diffusers pipeline otherwise; the pictures are the same.
"""

from __future__ import annotations

from training.comfyui import PACK, Server, find_comfyui, make_base_directory, version
from training.demo.painters import ComfyUIPainter, DiffusersPainter
from training.demo.sheet import draw_demo

OUTPUT = PACK / "output"


def main() -> None:
    OUTPUT.mkdir(exist_ok=True)
    comfyui = find_comfyui()
    if comfyui is None:
        print("No ComfyUI found: sampling through the diffusers pipeline.")
        sheet = draw_demo(DiffusersPainter(PACK / "models"))
    else:
        print(f"Sampling in ComfyUI {version(comfyui)} ({comfyui}).")
        with Server(comfyui, make_base_directory(OUTPUT / "comfyui")) as server:
            sheet = draw_demo(ComfyUIPainter(server))
    sheet.save(OUTPUT / "contact_sheet.png")
    print(f"Contact sheet: {OUTPUT / 'contact_sheet.png'}")


if __name__ == "__main__":
    main()
