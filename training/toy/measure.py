"""python -m training.toy.measure: does a MoA put the right people into the scene that the prior would have drawn?

Thirty prompts for one person and ten for two, drawn by the prior and by MoA with people that no training has
seen, and again with the references exchanged: one person's for another's, or the two people's of a picture
for each other. The judges (training.toy.readout) were trained on renders alone.

The subjects' area is what the segmentation judge calls a person in either of the two pictures, grown by GROW
pixels; the routers are not asked, for they are themselves measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from moa_core.moa_file import load_moa
from moa_core.subject import Subject
from toy_world.draw import draw_person
from toy_world.world import (
    ACTIONS,
    AGES,
    FRAMINGS,
    PLACES,
    WORDS,
    Identity,
    Person,
    Scene,
    sample_clothes,
    sample_identity,
)
from training.host.pipeline import MoAPipeline
from training.host.pretrained import load_base
from training.toy.readout import (
    CONTEXT,
    IDENTITY,
    JUDGES,
    TEST,
    TEST_SCENES,
    Readout,
    accuracy,
    draw_renders,
    labels,
    views,
)

STEPS, CFG = 12, 4.0
GROW = 2
"""Pixels around the subjects that still count as theirs: edges are smooth."""
SINGLES, PAIRS = 30, 10
PER_PROMPT = 3


@dataclass(frozen=True)
class Case:
    """One prompt, drawn as often as there are rows of references; references[i]: those of the i-th person."""

    scene: Scene
    references: list[list[Identity]]
    seed: int

    def exchanged(self) -> Case:
        """The same prompt and noise with other people: the next row's, or the other person's."""
        if len(self.references) == 2:
            return replace(self, references=self.references[::-1])
        return replace(self, references=[rows[1:] + rows[:1] for rows in self.references])


def cases(singles: int = SINGLES, pairs: int = PAIRS) -> Iterator[Case]:
    """The prompts: every place with every action, and pairs of any two words."""
    for n in range(singles):
        rng = np.random.default_rng([n, 1])
        person = _person(rng, ACTIONS[n % 5], AGES[n % 3] if n % 4 else "adult", WORDS[(n // 2) % 2])
        people = [sample_identity(rng, person.word, person.age, held_out=True) for _ in range(PER_PROMPT)]
        yield Case(_scene(n, (person,)), [people], seed=n)
    for n in range(pairs):
        rng = np.random.default_rng([n, 2])
        people = tuple(_person(rng, ACTIONS[(n + i) % 4], "adult", WORDS[(n >> i) % 2]) for i in range(2))
        rows = [_two_unlike(rng) for _ in range(PER_PROMPT)]
        yield Case(_scene(n, people), [list(column) for column in zip(*rows, strict=True)], seed=100 + n)


def _person(rng: np.random.Generator, action: str, age: str, word: str) -> Person:
    nobody = sample_identity(rng, word, age)
    return Person(nobody, word, age, action, sample_clothes(rng), age_said=age != "adult")


def _scene(n: int, people: tuple[Person, ...]) -> Scene:
    riding = any(person.action == "riding a bike" for person in people)
    return Scene(tuple(PLACES)[n % 6], "full length" if riding else FRAMINGS[n % 2], people)


def _two_unlike(rng: np.random.Generator) -> tuple[Identity, Identity]:
    """Two people who may go by either word, of other skin and other hair."""
    while True:
        a, b = (sample_identity(rng, "woman", "adult", held_out=True) for _ in range(2))
        if a.skin != b.skin and a.hair != b.hair and "pigtails" not in (a.style, b.style):
            return a, b


@dataclass(frozen=True)
class Drawn:
    """pictures [B, 3, H, W] in -1..1, and the routers' shares [B, h, w] (None for the prior)."""

    pictures: Tensor
    area: Tensor | None


def draw(pipeline: MoAPipeline, case: Case, strength: float = 1.0, subject_cfg: float | None = None) -> Drawn:
    """strength 0 is the prior, which no reference reaches; subject_cfg: see MoAPipeline."""
    subjects = []
    for person, identities in zip(case.scene.people, case.references, strict=True):
        references = [reference(pipeline, identity, person.word) for identity in identities]
        subjects.append(Subject(torch.cat([r.features for r in references]), person.word, person.word))
    options = {"steps": STEPS, "cfg": CFG, "strength": strength, "batch": PER_PROMPT, "subject_cfg": subject_cfg}
    pictures, trace = pipeline(case.scene.caption, subjects, seed=case.seed, **options)
    return Drawn(pictures.movedim(-1, 1) * 2 - 1, trace.subject_area() if trace else None)


def reference(pipeline: MoAPipeline, identity: Identity, word: str) -> Subject:
    """Someone as a user would show them: a portrait of an adult before nothing, whatever the prompt says."""
    image, mask = draw_person(identity, word)
    pixels = torch.from_numpy(np.array(image)).float() / 255
    return pipeline.encode_subject(pixels[None], word, torch.from_numpy(mask).float()[None])


@dataclass
class Figures:
    """Sums and counts under names; a figure is their quotient."""

    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    counts: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, name: str, values: Tensor, weights: Tensor | None = None) -> None:
        values = values.double()
        weights = torch.ones_like(values) if weights is None else weights.double()
        self.sums[name] += float((values * weights).sum())
        self.counts[name] += float(weights.sum())

    @classmethod
    def total(cls, parts: Iterable[Figures]) -> Figures:
        whole = cls()
        for part in parts:
            for name in part.sums:
                whole.sums[name] += part.sums[name]
                whole.counts[name] += part.counts[name]
        return whole

    def __getitem__(self, name: str) -> float | None:
        return round(self.sums[name] / self.counts[name], 4) if self.counts[name] else None

    def part(self, prefix: str) -> dict[str, float | None]:
        return {name.removeprefix(prefix): self[name] for name in list(self.sums) if name.startswith(prefix)}


@torch.no_grad()
def judge(figures: Figures, who: str, readout: Readout, case: Case, pictures: Tensor) -> None:
    """Adds what the judges see in the pictures: right answers per attribute, and for two people who is who."""
    people = case.scene.people
    seen = [readout(view) for view in views(pictures, len(people))]
    wanted = answers(case)
    for logits, rows in zip(seen, wanted, strict=True):
        for name in (*CONTEXT, *IDENTITY):
            figures.add(f"{who}.{name}", logits[name].argmax(dim=1) == torch.tensor([row[name] for row in rows]))
    if len(people) == 2:
        figures.add(f"{who}.assigned", assigned(seen, wanted))
        judge_leak(figures, who, seen, wanted)


def answers(case: Case) -> list[list[dict[str, int]]]:
    """For each person of the scene, the right answers in each of the case's pictures."""
    return [
        [labels(case.scene, replace(person, identity=identity)) for identity in identities]
        for person, identities in zip(case.scene.people, case.references, strict=True)
    ]


def assigned(seen: list[dict[str, Tensor]], wanted: list[list[dict[str, int]]]) -> Tensor:
    """bool [B]: whether the left person is more likely the left reference's, and the right one the right's."""
    return preference(seen, wanted) > 0


def preference(seen: list[dict[str, Tensor]], wanted: list[list[dict[str, int]]]) -> Tensor:
    """[B]: how much likelier (log) both references are at their own places than at each other's.

    seen: logits [B, values] of the left and the right person; wanted: the labels of both references.
    """

    def score(side: int, who: int) -> Tensor:
        per_head = []
        for name in IDENTITY:
            answer = torch.tensor([row[name] for row in wanted[who]])[:, None]
            per_head.append(seen[side][name].log_softmax(dim=1).gather(1, answer)[:, 0])
        return sum(per_head)

    return score(0, 0) + score(1, 1) - score(0, 1) - score(1, 0)


def judge_leak(figures: Figures, who: str, seen: list[dict[str, Tensor]], wanted: list[list[dict[str, int]]]) -> None:
    """How often one of two people shows what only the other one's reference does, of all that tells the two apart."""
    for name in IDENTITY:
        own = torch.tensor([[row[name] for row in rows] for rows in wanted])  # [2, B]
        shown = torch.stack([logits[name].argmax(dim=1) for logits in seen])
        figures.add(f"{who}.leak", shown == own.flip(0), weights=own != own.flip(0))


def judge_layout(figures: Figures, who: str, a: Tensor, b: Tensor) -> None:
    """How differently people [B, H, W] stand in two pictures of the same prompt and references: 1 - overlap."""
    overlap = (a & b).sum(dim=(1, 2)) / (a | b).sum(dim=(1, 2)).clamp(min=1)
    figures.add(f"{who}.layout", 1 - overlap)


def judge_change(figures: Figures, people: Tensor, a: Tensor, b: Tensor) -> None:
    """Mean absolute change (of a range of 1) between pictures [B, 3, H, W] in -1..1, by people [B, H, W]."""
    grown = F.max_pool2d(people.float(), 2 * GROW + 1, stride=1, padding=GROW)
    change = (a - b).abs().mean(dim=1) / 2
    figures.add("change.inside", change, grown)
    figures.add("change.outside", change, 1 - grown)


def judge_routers(figures: Figures, people: Tensor, area: Tensor) -> None:
    """Routers' shares [B, h, w] where the pictures' own people [B, H, W] are, and elsewhere."""
    inside = F.interpolate(people.float()[:, None], area.shape[1:], mode="area")[:, 0]
    figures.add("router.inside", area, inside)
    figures.add("router.outside", area, 1 - inside)


@torch.no_grad()
def measure_prior(pipeline: MoAPipeline, readout: Readout, case: Case) -> Figures:
    """What the judges see in the prior's pictures of a prompt, all of other noise."""
    figures, started = Figures(), time.monotonic()
    pictures = draw(pipeline, case, strength=0.0).pictures
    figures.add("prior.seconds", torch.tensor([time.monotonic() - started]) / PER_PROMPT)
    judge(figures, "prior", readout, case, pictures)
    if len(case.references) == 1:
        people = readout.people(pictures)
        judge_layout(figures, "prior", people, people.roll(-1, 0))
    return figures


@torch.no_grad()
def measure_moa(pipeline: MoAPipeline, readout: Readout, case: Case, subject_cfg: float | None = None) -> Figures:
    """What they see in MoA's, with each reference and its exchange."""
    figures, both, started = Figures(), [], time.monotonic()
    for one in (case, case.exchanged()):
        both.append(draw(pipeline, one, subject_cfg=subject_cfg))
    figures.add("moa.seconds", torch.tensor([time.monotonic() - started]) / (2 * PER_PROMPT))
    people = [readout.people(drawn.pictures) for drawn in both]
    for one, drawn, where in zip((case, case.exchanged()), both, people, strict=True):
        judge(figures, "moa", readout, one, drawn.pictures)
        judge_routers(figures, where, drawn.area)
    judge_change(figures, people[0] | people[1], both[0].pictures, both[1].pictures)
    if len(case.references) == 1:  # the n-th exchanged picture shows whom the n + 1st shows before
        judge_layout(figures, "moa", people[1], people[0].roll(-1, 0))
    return figures


def measure(pipeline: MoAPipeline, readout: Readout, subject_cfg: float | None = None) -> dict:
    """Every figure, on prompts and people that are always the same; subject_cfg: see MoAPipeline."""
    started = time.monotonic()
    renders = accuracy(readout, draw_renders(0, TEST, TEST_SCENES))
    print("judges on held-out renders:", ", ".join(f"{k} {v:.3f}" for k, v in renders.items()), flush=True)
    parts: list[Figures] = []
    for case in tqdm(list(cases()), desc="sampling", unit="prompt"):
        parts += [measure_prior(pipeline, readout, case), measure_moa(pipeline, readout, case, subject_cfg)]
    figures = Figures.total(parts)
    change = figures.part("change.")
    change["outside/inside"] = round(change["outside"] / change["inside"], 4) if change["inside"] else None
    return {
        "renders": {name: round(value, 4) for name, value in renders.items()},
        "prior": figures.part("prior."),
        "moa": figures.part("moa."),
        "change": change,
        "router": figures.part("router."),
        "pictures": 3 * PER_PROMPT * (SINGLES + PAIRS),
        "seconds": round(time.monotonic() - started),
    }


def table(result: dict) -> str:
    """The figures for people to read."""
    lines = [f"{'share of right answers':32}{'renders':>9}{'prior':>9}{'MoA':>9}"]
    names = {name: name for name in (*CONTEXT, *IDENTITY)}
    names |= {"assigned": "two people at the right words", "leak": "one of two shows the other's"}
    for key, name in names.items():
        row = [_number(result[who].get(key)) for who in ("renders", "prior", "moa")]
        lines.append(f"{name:32}" + "".join(f"{cell:>9}" for cell in row))
    lines += ["(the prior knows no reference: its identity and its words of two people are what chance gives)", ""]
    lines.append(f"{'with references exchanged':32}{'inside':>9}{'outside':>9}{'ratio':>9}")
    change, router = result["change"], result["router"]
    for name, part in (("mean absolute change", change), ("router's share for the expert", router)):
        ratio = part["outside"] / part["inside"] if part["inside"] and part["outside"] is not None else None
        lines.append(f"{name:32}{_number(part['inside']):>9}{_number(part['outside']):>9}{_number(ratio):>9}")
    return "\n".join([*lines, "", f"{result['pictures']} pictures in {result['seconds']} seconds"])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.toy.measure", description=__doc__.split("\n\n")[0])
    parser.add_argument("--base", type=Path, required=True, help="base checkpoint (moa-toy-base.safetensors)")
    parser.add_argument("--moa", type=Path, required=True, help="MoA file (moa-toy.safetensors)")
    parser.add_argument("--judges", type=Path, default=JUDGES, help="their weights (default: those that come along)")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument(
        "--subject-cfg",
        type=float,
        help="sample MoA with uncond + 4 (prior - uncond) + S (moa - prior), a guidance of ours, not the paper's",
    )
    args = parser.parse_args(argv)
    try:
        pipeline = MoAPipeline(load_base(args.base), load_moa(args.moa))
        result = measure(pipeline, Readout.load(args.judges), args.subject_cfg)
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(table(result))
    if args.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
