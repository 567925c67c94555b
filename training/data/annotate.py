"""Pictures of people -> records: captions, people, and which noun phrase is whom.

As FastComposer prepared FFHQ: BLIP-2 writes a caption, Mask2Former finds the people, and CLIP says which
noun phrase of the caption is which of them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    Blip2ForConditionalGeneration,
    CLIPModel,
    Mask2FormerForUniversalSegmentation,
)

from training.data.layout import bounding_box, is_written, place, write_names, write_record
from training.data.pairing import pair_up
from training.data.pictures import PictureFiles, find_pictures
from training.data.processes import processes, share_of_missing
from training.host.pretrained import read_model

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


class Annotator:
    """The three models, from folders as transformers saves them."""

    def __init__(self, captioner: Path, segmenter: Path, matcher: Path, device: torch.device):
        self.device = device
        local = {"local_files_only": True}
        writer = read_model(Blip2ForConditionalGeneration, captioner)
        self.captioner = (writer.half() if device.type == "cuda" else writer.float()).to(device).eval()
        self.segmenter = read_model(Mask2FormerForUniversalSegmentation, segmenter).to(device).eval()
        self.matcher = read_model(CLIPModel, matcher).to(device).eval()
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


def annotate_pictures(pictures: Path, out: Path, annotator: Annotator, batch: int, workers: int) -> int:
    """Annotates what is missing in `out`; returns the number of records there with at least one person.

    Processes share the work; the lists of records are the main one's, written when all are done.
    """
    state, files = processes(), find_pictures(pictures)
    own = {name: files[name] for name in share_of_missing(list(files), lambda name: is_written(out, name))}
    loader = DataLoader(PictureFiles(own), batch, num_workers=workers, collate_fn=list)
    with tqdm(total=len(own), unit="picture", disable=not state.is_main_process) as bar:
        for loaded in loader:
            readable = [(name, picture) for name, picture in loaded if picture is not None]
            if readable:
                for (name, picture), found in zip(readable, annotator.annotate([p for _, p in readable]), strict=True):
                    write_record(out, name, picture, found.ids, found.info)
            bar.update(len(loaded))
    state.wait_for_everyone()
    useful = list(_with_people(out, files))
    if state.is_main_process:
        write_names(out, useful, (name for name in useful if held_out(name)))
    state.wait_for_everyone()
    return len(useful)


def _with_people(out: Path, names: dict[str, Path]) -> Iterator[str]:
    for name in names:
        if is_written(out, name) and json.loads(place(out, name, "json").read_text(encoding="utf-8"))["segments"]:
            yield name


def held_out(name: str) -> bool:
    """Whether a record belongs to the test split; the same in every run."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") < TEST_SHARE * 2**32
