"""`make demo`: two people from reference pictures in one scene, through a real ComfyUI where there is one.

Without a ComfyUI the same goes through the diffusers pipeline.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from moa_core.moa_file import load_moa, save_moa
from training.base import load_base
from training.comfyui import PACK, Server, find_comfyui, make_base_directory, version
from training.pipeline import MoAPipeline
from training.toy.base import ToyBase
from training.toy.draw import draw_person
from training.toy.world import sample_identity

OUTPUT = PACK / "output"
CHECKPOINT, MOA = "moa-toy-base.safetensors", "moa-toy.safetensors"
PROMPT, NEGATIVE = "a man waving and a woman holding flowers on a beach", ""
WORDS = ("man", "woman")
STEPS, CFG, SEED = 12, 4.0, 7


def main() -> None:
    base = make_base_directory(OUTPUT / "comfyui")
    references = make_references(base / "input")
    make_models(base / "models")
    comfyui = find_comfyui()
    if comfyui is None:
        print("No ComfyUI found: sampling through the diffusers pipeline.")
        pictures = through_diffusers(base, references)
    else:
        print(f"Sampling in ComfyUI {version(comfyui)} ({comfyui}).")
        pictures = through_comfyui(comfyui, base, references)
    named = [(path.stem, Image.open(path)) for path in references] + list(pictures.items())
    for name, picture in pictures.items():
        picture.save(OUTPUT / f"{name}.png")
    contact_sheet(named).save(OUTPUT / "contact_sheet.png")
    print("The toy weights are not trained yet: the pictures show noise. What runs is the whole way to them.")
    print(f"Pictures and contact sheet: {OUTPUT}")


def make_references(folder: Path) -> list[Path]:
    """One cut-out person for each word."""
    paths = []
    for number, word in enumerate(WORDS):
        picture, mask = draw_person(sample_identity(np.random.default_rng(number), word, "adult"), word)
        picture.putalpha(Image.fromarray(mask.astype(np.uint8) * 255))
        paths.append(folder / f"{word}.png")
        picture.save(paths[-1])
    return paths


def make_models(folder: Path) -> None:
    """An untrained toy base and a fresh MoA for it."""
    base = ToyBase.random(0)
    base.save(folder / "checkpoints" / CHECKPOINT)
    save_moa(base.fresh_moa(), folder / "moa" / MOA)


def through_comfyui(comfyui: Path, base: Path, references: list[Path]) -> dict[str, Image.Image]:
    with Server(comfyui, base) as server:
        entry = server.queue(
            graph(CHECKPOINT, MOA, [(path.name, word) for path, word in zip(references, WORDS, strict=True)])
        )
        return {
            "moa": Image.open(io.BytesIO(server.pictures(entry, "save")[0])),
            "router": Image.open(io.BytesIO(server.pictures(entry, "maps")[0])),
        }


def through_diffusers(base: Path, references: list[Path]) -> dict[str, Image.Image]:
    moa = load_moa(base / "models/moa" / MOA)
    pipeline = MoAPipeline(load_base(base / "models/checkpoints" / CHECKPOINT), moa)
    subjects = []
    for path, word in zip(references, WORDS, strict=True):
        pixels = torch.from_numpy(np.asarray(Image.open(path), dtype=np.float32) / 255)[None]  # [1, H, W, 4]
        subjects.append(pipeline.encode_subject(pixels[..., :3], word, pixels[..., 3]))
    pictures, trace = pipeline(PROMPT, subjects, NEGATIVE, steps=STEPS, cfg=CFG, seed=SEED)
    area = Image.fromarray((trace.subject_area()[0].numpy() * 255).astype(np.uint8))
    return {"moa": to_image(pictures[0]), "router": area.resize((128, 128)).convert("RGB")}


def graph(
    checkpoint: str, moa: str, people: list[tuple[str, str]], prompt: str = PROMPT, seed: int = SEED
) -> dict[str, Any]:
    """The API workflow: people are (file in the input folder, cut out by its alpha; word)."""
    nodes: dict[str, Any] = {
        "base": _node("CheckpointLoaderSimple", ckpt_name=checkpoint),
        "moa": _node("MoALoader", moa_name=moa),
        "patch": _node(
            "MoAPatchModel",
            model=["base", 0],
            clip=["base", 1],
            moa=["moa", 0],
            strength=1.0,
            start_percent=0.0,
            end_percent=1.0,
            routing="sparse",
        ),
        "positive": _node("CLIPTextEncode", clip=["patch", 1], text=prompt),
        "negative": _node("CLIPTextEncode", clip=["patch", 1], text=NEGATIVE),
        "latent": _node("EmptyLatentImage", width=128, height=128, batch_size=1),
        "sample": _node(
            "KSampler",
            model=["patch", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["latent", 0],
            seed=seed,
            steps=STEPS,
            cfg=CFG,
            sampler_name="uni_pc",
            scheduler="normal",
            denoise=1.0,
        ),
        "decode": _node("VAEDecode", samples=["sample", 0], vae=["base", 2]),
        "save": _node("SaveImage", images=["decode", 0], filename_prefix="moa"),
        "visualize": _node("MoARouterVisualizer", model=["patch", 0], samples=["sample", 0], image=["decode", 0]),
        "maps": _node("PreviewImage", images=["visualize", 0]),
    }
    for number, (file, word) in enumerate(people):
        nodes[f"image{number}"] = _node("LoadImage", image=file)
        nodes[f"mask{number}"] = _node("InvertMask", mask=[f"image{number}", 1])  # LoadImage's mask is the background
        nodes[f"subject{number}"] = _node(
            "MoASubjectEncoder", moa=["moa", 0], image=[f"image{number}", 0], word=word, mask=[f"mask{number}", 0]
        )
        nodes["patch"]["inputs"][f"subjects.subject{number}"] = [f"subject{number}", 0]
    return nodes


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def to_image(picture: torch.Tensor) -> Image.Image:
    """[H, W, 3] in 0..1."""
    return Image.fromarray((picture.numpy() * 255).round().astype(np.uint8))


def contact_sheet(named: list[tuple[str, Image.Image]], side: int = 384) -> Image.Image:
    """Pictures side by side, each with its name."""
    sheet = Image.new("RGB", (side * len(named), side + 28), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(18)
    for column, (name, picture) in enumerate(named):
        draw.text((column * side + 8, 4), name, "black", font)
        fitted = picture.convert("RGB").copy()
        fitted = fitted.resize([max(1, round(length * (side - 8) / max(fitted.size))) for length in fitted.size])
        sheet.paste(fitted, (column * side + 4, 28))
    return sheet


if __name__ == "__main__":
    main()
