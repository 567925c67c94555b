"""python -m training.prepare: pictures of people -> the FFHQ layout that `training.train` reads.

As FastComposer prepared FFHQ: BLIP-2 writes a caption, Mask2Former finds the people, and CLIP says which
noun phrase of the caption is which of them. Records that are there already are kept, so a stopped run goes on.
With --base, training.latents follows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    Blip2ForConditionalGeneration,
    CLIPModel,
    Mask2FormerForUniversalSegmentation,
)

from training.data import TooManyBroken
from training.host.pretrained import load_base
from training.latents import write_latents
from training.layout import bounding_box, is_written, write_names, write_record

log = logging.getLogger(__name__)

ENDINGS = {".jpg", ".jpeg", ".png", ".webp"}
PERSON = "person"
"""COCO's label of a human being."""
WORDS = "man|woman|person|boy|girl|child|kid|baby|lady|gentleman|guy|player|actor|actress|bride|groom"
"""Nouns that a single human being may be called in a caption."""
PHRASE = re.compile(rf"\b(?:(?:an?|the|one|another)\s+(?:[\w-]+\s+){{0,3}}?)?(?:{WORDS})\b", re.IGNORECASE)
SMALLEST_SHARE = 0.005
"""Segments that cover less of the picture are people in the background."""
NEUTRAL = (123, 117, 104)
CAPTION_TOKENS = 40
TEST_SHARE = 0.02


@dataclass(frozen=True)
class Found:
    """A picture's caption and its people: ids [H, W], 0 = background, n the n-th person."""

    caption: str
    ids: np.ndarray
    phrases: list[tuple[int, int]]
    """Characters [start, end) of each person's noun phrase."""

    @property
    def info(self) -> dict:
        """The record's JSON."""
        segments = [
            {"id": n, "bbox": bounding_box(self.ids == n), "coco_label": PERSON, "start": start, "end": end}
            | {"word": self.caption[start:end].split()[-1].lower()}
            for n, (start, end) in enumerate(self.phrases, start=1)
        ]
        return {"caption": self.caption, "segments": segments}


def noun_phrases(caption: str) -> list[tuple[int, int]]:
    """Characters [start, end) of every phrase that names one person: `an old man`, `woman`."""
    return [match.span() for match in PHRASE.finditer(caption)]


def pair_up(scores: Tensor) -> list[tuple[int, int]]:
    """Greedy: scores [phrases, segments] -> (phrase, segment), the surest first, each at most once."""
    pairs, left = [], scores.clone()
    for _ in range(min(scores.shape)):
        phrase, segment = divmod(int(left.argmax()), scores.shape[1])
        pairs.append((phrase, segment))
        left[phrase], left[:, segment] = -torch.inf, -torch.inf
    return pairs


class Annotator:
    """The three models, from folders as transformers saves them."""

    def __init__(self, captioner: Path, segmenter: Path, matcher: Path, device: torch.device):
        self.device = device
        local = {"local_files_only": True}
        half = {"dtype": torch.float16 if device.type == "cuda" else torch.float32}
        self.captioner = Blip2ForConditionalGeneration.from_pretrained(captioner, **half, **local).to(device).eval()
        self.segmenter = Mask2FormerForUniversalSegmentation.from_pretrained(segmenter, **local).to(device).eval()
        self.matcher = CLIPModel.from_pretrained(matcher, **local).to(device).eval()
        self.caption_processor = AutoProcessor.from_pretrained(captioner, **local)
        self.segment_processor = AutoImageProcessor.from_pretrained(segmenter, **local)
        self.match_processor = AutoProcessor.from_pretrained(matcher, **local)
        self.person = [number for number, label in self.segmenter.config.id2label.items() if label == PERSON]
        if not self.person:
            raise ValueError(f"{segmenter} knows no label '{PERSON}': expected a Mask2Former trained on COCO")

    @torch.no_grad()
    def annotate(self, pictures: list[Image.Image]) -> list[Found]:
        captions, maps = self.captions(pictures), self.people(pictures)
        return [self.match(*one) for one in zip(pictures, captions, maps, strict=True)]

    def captions(self, pictures: list[Image.Image]) -> list[str]:
        inputs = self.caption_processor(images=pictures, return_tensors="pt").to(self.device, self.captioner.dtype)
        ids = self.captioner.generate(**inputs, max_new_tokens=CAPTION_TOKENS, do_sample=False)
        texts = self.caption_processor.batch_decode(ids, skip_special_tokens=True)
        return [" ".join(text.split()) for text in texts]

    def people(self, pictures: list[Image.Image]) -> list[np.ndarray]:
        """[H, W] each: 0, or the number of the person that a pixel shows."""
        inputs = self.segment_processor(images=pictures, return_tensors="pt").to(self.device)
        found = self.segment_processor.post_process_panoptic_segmentation(
            self.segmenter(**inputs), target_sizes=[picture.size[::-1] for picture in pictures], label_ids_to_fuse=set()
        )
        maps = []
        for one in found:
            segmentation, ids = one["segmentation"].cpu().numpy(), np.zeros(one["segmentation"].shape, np.uint8)
            people = [s["id"] for s in one["segments_info"] if s["label_id"] in self.person]
            large = [n for n in people if (segmentation == n).mean() >= SMALLEST_SHARE]
            for number, n in enumerate(large[:255], start=1):
                ids[segmentation == n] = number
            maps.append(ids)
        return maps

    def match(self, picture: Image.Image, caption: str, ids: np.ndarray) -> Found:
        """Keeps the people that a phrase of the caption names, numbered in the caption's order."""
        phrases, people = noun_phrases(caption), range(1, int(ids.max()) + 1)
        if not phrases or not people:
            return Found(caption, np.zeros_like(ids), [])
        inputs = self.match_processor(
            text=[caption[start:end] for start, end in phrases],
            images=[cut_out(picture, ids == n) for n in people],
            return_tensors="pt",
            padding=True,
        ).to(self.device)
        pairs = sorted(pair_up(self.matcher(**inputs).logits_per_text.float().cpu()))
        kept = np.zeros_like(ids)
        for number, (_, segment) in enumerate(pairs, start=1):
            kept[ids == segment + 1] = number
        return Found(caption, kept, [phrases[phrase] for phrase, _ in pairs])


def cut_out(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    """The person alone, in the middle of a neutral square."""
    left, top, right, bottom = bounding_box(mask)
    pixels = np.where(mask[..., None], np.asarray(picture), np.uint8(NEUTRAL))[top:bottom, left:right]
    side = max(pixels.shape[:2])
    square = Image.new("RGB", (side, side), NEUTRAL)
    square.paste(Image.fromarray(pixels), ((side - pixels.shape[1]) // 2, (side - pixels.shape[0]) // 2))
    return square


class Pictures(Dataset):
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


def prepare(pictures: Path, out: Path, annotator: Annotator, batch: int, workers: int) -> int:
    """Annotates what is missing in `out`; returns the number of records there with at least one person."""
    files = find_pictures(pictures)
    missing = {name: path for name, path in files.items() if not is_written(out, name)}
    loader = DataLoader(Pictures(missing), batch, num_workers=workers, collate_fn=list)
    with tqdm(total=len(files), initial=len(files) - len(missing), unit="picture") as bar:
        for loaded in loader:
            readable = [(name, picture) for name, picture in loaded if picture is not None]
            if readable:
                for (name, picture), found in zip(readable, annotator.annotate([p for _, p in readable]), strict=True):
                    write_record(out, name, picture, found.ids, found.info)
            bar.update(len(loaded))
    useful = list(_with_people(out, files))
    write_names(out, useful, (name for name in useful if held_out(name)))
    return len(useful)


def _with_people(out: Path, names: dict[str, Path]) -> Iterator[str]:
    for name in names:
        if is_written(out, name) and json.loads((out / name[:5] / f"{name}.json").read_text())["segments"]:
            yield name


def held_out(name: str) -> bool:
    """Whether a record belongs to the test split; the same in every run."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") < TEST_SHARE * 2**32


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.prepare", description=__doc__.split("\n\n")[0])
    parser.add_argument("--pictures", type=Path, required=True, help="folder of pictures, searched to its bottom")
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set, new or from an earlier run")
    parser.add_argument("--captioner", type=Path, required=True, help="folder of a BLIP-2 (blip2-opt-2.7b)")
    parser.add_argument(
        "--segmenter", type=Path, required=True, help="folder of a Mask2Former trained on COCO panoptic"
    )
    parser.add_argument("--matcher", type=Path, required=True, help="folder of a CLIP (clip-vit-large-patch14)")
    parser.add_argument("--batch", type=int, default=8, help="(default %(default)s)")
    parser.add_argument("--workers", type=int, default=4, help="processes that read pictures (default %(default)s)")
    parser.add_argument("--base", type=Path, help="what model.base of the training is: caches the pictures' latents")
    parser.add_argument("--size", type=int, default=512, help="data.size of the training (default %(default)s)")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        autoencoder = load_base(args.base).autoencoder.to(device) if args.base else None
        annotator = Annotator(args.captioner, args.segmenter, args.matcher, device)
        useful = prepare(args.pictures, args.out, annotator, args.batch, args.workers)
        if autoencoder is not None:
            write_latents(args.out, autoencoder, args.size, args.batch, args.workers)
    except (OSError, ValueError, TooManyBroken) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(f"{useful} records with people in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
