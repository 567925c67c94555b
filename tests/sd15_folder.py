"""A Stable Diffusion 1.5 and a CLIP ViT-L/14 of the real size with random weights: sd15_folder.py FOLDER

In diffusers' and transformers' layout, fp16. As a script in a process of its own, so that its memory is its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from training.host import sd15


def main(folder: Path) -> None:
    torch.manual_seed(0)
    parts = {
        "sd15/unet": sd15.unet(),
        "sd15/vae": sd15.autoencoder(),
        "sd15/text_encoder": sd15.text_encoder(),
        "clip": sd15.image_encoder(),
    }
    for name, model in parts.items():
        model.half().save_pretrained(folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
