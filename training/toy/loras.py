"""python -m training.toy.loras: two people from two LoRAs in one picture, in figures.

Every prompt names two people of whom each has a LoRA of their own; the judges (judges.py) say who is who.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from moa_core.adapters.deltas import deltas_of
from moa_core.adapters.run import Adapters
from moa_core.learned.moa_file import load_moa
from moa_core.learned.unet_call import UNetCall
from moa_core.subjects.binding import OwnText
from moa_core.subjects.subject import Subject
from toy_world.world import ACTIONS, PLACES, Identity, Person, Scene, sample_clothes, someone
from training.finetune.contact_sheet import sheet
from training.host.adapter import MoAUNet
from training.host.lora import read_lora, write_into
from training.host.pipeline import MoAPipeline
from training.host.pretrained import load_base
from training.toy.cases import CFG, STEPS, Case, reference
from training.toy.figures import Figures, judge, judge_change
from training.toy.judges import Readout
from training.toy.renders import IDENTITY

MODELS = Path(__file__).parents[2] / "models"
BASE = MODELS / "checkpoints/moa-toy-base.safetensors"
PEOPLE = (("man", 18), ("man", 8), ("woman", 10))
"""Whom the shipped LoRAs are of: word and person of `training.toy person-lora`."""
BATCH = 3
PROMPTS = 18
FOUND_AFTER = 2
"""Steps from which masks that are found once are taken."""


@dataclass(frozen=True)
class Known:
    """Somebody with a LoRA."""

    word: str
    person: int

    @property
    def identity(self) -> Identity:
        return someone(self.person, self.word)

    @property
    def file(self) -> Path:
        return MODELS / "loras" / f"moa-toy-{self.word}-{self.person}.safetensors"


@dataclass(frozen=True)
class Pair:
    """A prompt of two people, and what each is called in it."""

    people: tuple[Known, Known]
    words: tuple[str, str]
    case: Case


def pairs(count: int, one_word: bool = False) -> Iterator[Pair]:
    """Prompts in turn of any two of the people, in either order; one_word: both are called a man."""
    both = list(permutations([Known(*who) for who in PEOPLE], 2))
    if one_word:
        both = [pair for pair in both if any(who.word == "woman" for who in pair)]
    else:
        both = [pair for pair in both if {who.word for who in pair} == {"man", "woman"}]
    for n in range(count):
        rng, people = np.random.default_rng([n, 3]), both[n % len(both)]
        words = ("man", "man") if one_word else tuple(who.word for who in people)
        shown = [
            Person(
                someone(who.person, who.word), word, "adult", ACTIONS[(n + i) % 4], sample_clothes(rng), age_said=False
            )
            for i, (who, word) in enumerate(zip(people, words, strict=True))
        ]
        scene = Scene(tuple(PLACES)[n % 6], ("full length", "portrait")[n // 6 % 2], tuple(shown))
        yield Pair(people, words, Case(scene, [[person.identity] * BATCH for person in shown], seed=300 + n))


class Drawer:
    """The toy base model with the LoRAs in every way that is compared."""

    def __init__(self, readout: Readout):
        self.readout, self.prior = readout, MoAPipeline(load_base(BASE))
        unet = self.prior.base.unet
        self.changes = {who: read_lora(unet, who.file) for who in (Known(*each) for each in PEOPLE)}
        self._merged: dict[frozenset[Known], MoAPipeline] = {}
        self._learned = MoAPipeline(load_base(BASE), load_moa(MODELS / "moa/moa-toy.safetensors"))
        self._plain: dict[tuple[str, int], Tensor] = {}

    def plain(self, pair: Pair) -> Tensor:
        """The prior's pictures, drawn once."""
        key = pair.case.scene.caption, pair.case.seed
        if key not in self._plain:
            self._plain[key] = _drawn(self.prior, pair)
        return self._plain[key]

    def ordinary(self, pair: Pair) -> Tensor:
        """Both LoRAs in all of the picture."""
        return _drawn(self.merged(*pair.people), pair)

    def masked(self, pair: Pair) -> Tensor:
        """ComfyUI's masked LoRA hooks: each LoRA in a U-Net call of its own, joined by perfect masks."""
        people = self.readout.people(self.plain(pair))  # [B, H, W]
        half, side = people.shape[-1] // 2, self.prior.base.unet.config.sample_size
        left, right = people.clone(), people.clone()
        left[..., half:], right[..., :half] = False, False
        masks = F.interpolate(torch.stack([left, right], dim=1).float(), (side, side), mode="area")
        drawn = MoAPipeline(self.prior.base, unet=self.prior.unet)
        drawn.unet = Joined(self.prior.unet, [self.merged(who).unet for who in pair.people], masks)
        return _drawn(drawn, pair)

    def found_once(self, pair: Pair) -> Tensor:
        """As FreeFuse (Liu et al., 2025) goes about it: masks from the first steps with both LoRAs at work, then fixed.

        The masks are made by our own rule, from our own layers; FreeFuse has others.
        """
        people, seen = [Subject(torch.ones(1, 1), word, word) for word in pair.words], []
        _drawn(self.merged(*pair.people), pair, people, watch=lambda call: seen.append(call.words.router.last()))
        return self.routed(pair, False, areas=seen[FOUND_AFTER])

    def routed(self, pair: Pair, own_text: bool = True, areas: Sequence[Tensor | None] = (None, None)) -> Tensor:
        """As LoRA Subject does it; own_text: each LoRA reads the word that it knows; areas: of each, [B, h, w]."""
        ones = torch.ones(1, 1)
        people = [Subject(ones, word, word, area=area) for word, area in zip(pair.words, areas, strict=True)]
        deltas = deltas_of(self.prior.base.unet, [self.changes[who] for who in pair.people])
        adapters = Adapters({}, {people[0]: [0], people[1]: [1]}, deltas)
        pipeline = MoAPipeline(self.prior.base, unet=self.prior.unet, adapters=adapters)
        texts, prompt = [], pair.case.scene.caption
        for number, (who, subject) in enumerate(zip(pair.people, people, strict=True)):
            if own_text and who.word != subject.word:
                earlier = pair.words[:number].count(subject.word)
                texts.append(pipeline.own_text(prompt, subject, earlier, who.word))
        return _drawn(pipeline, pair, people, texts)

    def beside_photo(self, pair: Pair) -> Tensor:
        """The first from the LoRA, the second from one picture, by the toy MoA."""
        first, second = pair.people
        learned = self._learned
        by_lora = Subject(torch.ones(1, 1), first.word, first.word, adapter=first)
        by_photo = reference(learned, second.identity, second.word)
        deltas = deltas_of(learned.base.unet, [self.changes[first]])
        adapters = Adapters({}, {by_lora: [0]}, deltas)
        return _drawn(MoAPipeline(learned.base, learned.moa, learned.unet, adapters), pair, [by_lora, by_photo])

    def alone(self, pair: Pair) -> Iterator[tuple[Case, Tensor]]:
        """Each of the two alone, in a picture of one person."""
        for who, person, identities in zip(pair.people, pair.case.scene.people, pair.case.references, strict=True):
            one = replace(person, word=who.word)
            case = Case(replace(pair.case.scene, people=(one,)), [identities], pair.case.seed)
            yield case, _drawn(self.merged(who), replace(pair, case=case))

    def merged(self, *people: Known) -> MoAPipeline:
        """The base model with these people's LoRAs written into it."""
        key = frozenset(people)
        if key not in self._merged:
            base = load_base(BASE)
            for who in people:
                write_into(base.unet, self.changes[who])
            self._merged[key] = MoAPipeline(base)
        return self._merged[key]


@dataclass(frozen=True)
class Joined:
    """Several U-Nets' predictions, each where its mask is, the prior's elsewhere; masks [B, K, h, w]."""

    prior: MoAUNet
    others: list[MoAUNet]
    masks: Tensor
    call_type = UNetCall

    def run(self, latents: Tensor, timestep: Tensor, context: Tensor, call: None) -> Tensor:
        masks = self.masks.repeat(len(latents) // len(self.masks), 1, 1, 1)[:, :, None]  # [2B, K, 1, h, w]
        drawn = self.prior.run(latents, timestep, context, None) * (1 - masks.sum(dim=1))
        for number, unet in enumerate(self.others):
            drawn = drawn + unet.run(latents, timestep, context, None) * masks[:, number]
        return drawn


def _drawn(
    pipeline: MoAPipeline, pair: Pair, people: Sequence[Subject] = (), texts: Sequence[OwnText] = (), **others
) -> Tensor:
    """[B, 3, H, W] in -1..1."""
    options = {"steps": STEPS, "cfg": CFG, "seed": pair.case.seed, "batch": BATCH, "own_texts": texts}
    pictures, _ = pipeline(pair.case.scene.caption, list(people), **options, **others)
    return pictures.movedim(-1, 1) * 2 - 1


def measured(readout: Readout, pair: Pair, pictures: Tensor, prior: Tensor) -> Figures:
    """What the judges see: who is who, and what has changed against the prior outside of all people."""
    figures = Figures()
    judge(figures, readout, pair.case, pictures)
    people = readout.people(pictures) | readout.people(prior)
    judge_change(figures, people, pictures, prior)
    return figures


def row(name: str, parts: list[Figures]) -> str:
    """One line of the table."""
    total = Figures.total(parts)
    identity = np.mean([total[part] for part in IDENTITY])
    cells = [identity, total["assigned"], total["leak"], total["change outside"]]
    return f"| {name} | " + " | ".join("-" if cell is None else f"{cell:.3f}" for cell in cells) + " |"


WAYS: dict[str, tuple[bool, Callable[[Drawer, Pair], Tensor]]] = {
    "both LoRAs loaded the ordinary way": (False, Drawer.ordinary),
    "ComfyUI's masked LoRA hooks, perfect masks": (False, Drawer.masked),
    "masks found once with both LoRAs at work, then kept": (False, Drawer.found_once),
    "LoRA Subject": (False, Drawer.routed),
    "one a LoRA Subject, the other from a photo": (False, Drawer.beside_photo),
    "both called `man`: ordinary": (True, Drawer.ordinary),
    "both called `man`: LoRA Subject, without triggers": (True, lambda drawer, pair: drawer.routed(pair, False)),
    "both called `man`: LoRA Subject": (True, Drawer.routed),
}
"""The rows: whether both people go by one word, and how they are drawn."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.toy.loras", description=__doc__)
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="pictures are three times as many")
    parser.add_argument("--rows", nargs="*", help="parts of their names; all where none is given")
    parser.add_argument("--sheet", type=Path, help="a contact sheet of the first pictures, a row each")
    options = parser.parse_args(argv)
    readout = Readout.load()
    drawer, shown = Drawer(readout), []
    print("| | identity | two at the right words | leak | change outside |\n|---|---|---|---|---|")
    chosen = {name: way for name, way in WAYS.items() if any(part in name for part in options.rows or [""])}
    with torch.no_grad():
        if not options.rows:
            alone = [drawer.alone(pair) for pair in pairs(options.prompts)]
            print(row("each LoRA alone, one person", [_judged(readout, *one) for both in alone for one in both]))
        for name, (one_word, draw) in chosen.items():
            figures, pictures = [], []
            for pair in tqdm(list(pairs(options.prompts, one_word)), desc=name, leave=False):
                pictures.append(draw(drawer, pair))
                figures.append(measured(readout, pair, pictures[-1], drawer.plain(pair)))
            shown.append(torch.stack([drawn[0] for drawn in pictures[:6]]))
            print(row(name, figures), flush=True)
    if options.sheet:
        sheet(shown, options.sheet)
    return 0


def _judged(readout: Readout, case: Case, pictures: Tensor) -> Figures:
    figures = Figures()
    judge(figures, readout, case, pictures)
    return figures


if __name__ == "__main__":
    sys.exit(main())
