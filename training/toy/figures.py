"""What the judges say of a drawer's pictures, as sums that add up over prompts.

The subjects' area is what the segmentation judge calls a person in either of the two pictures, grown by GROW
pixels; the routers are not asked, for they are themselves measured.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from toy_world.shape import IMAGE_SIZE
from training.host.pipeline import MoAPipeline
from training.toy.cases import PER_PROMPT, Case, draw
from training.toy.judges import Readout
from training.toy.renders import CONTEXT, IDENTITY, labels, views

GROW = IMAGE_SIZE // 64
"""Pixels around the subjects that still count as theirs: edges are smooth."""


@dataclass
class Figures:
    """Sums and counts of one drawer's pictures under names; a figure is their quotient."""

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

    def all(self) -> dict[str, float | None]:
        return {name: self[name] for name in list(self.sums)}


@torch.no_grad()
def judge(figures: Figures, readout: Readout, case: Case, pictures: Tensor) -> None:
    """Adds what the judges see in the pictures: right answers per attribute, and for two people who is who."""
    people = case.scene.people
    seen = [readout(view) for view in views(pictures, len(people))]
    wanted = answers(case)
    for logits, rows in zip(seen, wanted, strict=True):
        for name in (*CONTEXT, *IDENTITY):
            figures.add(name, logits[name].argmax(dim=1) == torch.tensor([row[name] for row in rows]))
    if len(people) == 2:
        figures.add("assigned", assigned(seen, wanted))
        judge_leak(figures, seen, wanted)


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


def judge_leak(figures: Figures, seen: list[dict[str, Tensor]], wanted: list[list[dict[str, int]]]) -> None:
    """How often one of two people shows what only the other one's reference does, of all that tells the two apart."""
    for name in IDENTITY:
        own = torch.tensor([[row[name] for row in rows] for rows in wanted])  # [2, B]
        shown = torch.stack([logits[name].argmax(dim=1) for logits in seen])
        figures.add("leak", shown == own.flip(0), weights=own != own.flip(0))


def judge_layout(figures: Figures, a: Tensor, b: Tensor) -> None:
    """How differently people [B, H, W] stand in two pictures of the same prompt and references: 1 - overlap."""
    overlap = (a & b).sum(dim=(1, 2)) / (a | b).sum(dim=(1, 2)).clamp(min=1)
    figures.add("layout", 1 - overlap)


def judge_change(figures: Figures, people: Tensor, a: Tensor, b: Tensor, name: str = "change") -> None:
    """Mean absolute change (of a range of 1) between pictures [B, 3, H, W] in -1..1, by people [B, H, W]."""
    grown = F.max_pool2d(people.float(), 2 * GROW + 1, stride=1, padding=GROW)
    change = (a - b).abs().mean(dim=1) / 2
    figures.add(f"{name} inside", change, grown)
    figures.add(f"{name} outside", change, 1 - grown)


def judge_routers(figures: Figures, people: Tensor, area: Tensor) -> None:
    """Routers' shares [B, h, w] where the pictures' own people [B, H, W] are, and elsewhere."""
    inside = F.interpolate(people.float()[:, None], area.shape[1:], mode="area")[:, 0]
    figures.add("router inside", area, inside)
    figures.add("router outside", area, 1 - inside)


@torch.no_grad()
def measure_prior(pipeline: MoAPipeline, readout: Readout, case: Case) -> tuple[Figures, Tensor]:
    """What the judges see in the prior's pictures of a prompt, all of other noise; and the pictures."""
    figures, started = Figures(), time.monotonic()
    drawn = draw(pipeline, case, strength=0.0)
    pictures = drawn.pictures
    figures.add("seconds", torch.tensor([time.monotonic() - started]) / PER_PROMPT)
    figures.add("calls", torch.tensor([drawn.calls]))
    judge(figures, readout, case, pictures)
    if len(case.references) == 1:
        people = readout.people(pictures)
        judge_layout(figures, people, people.roll(-1, 0))
    return figures, pictures


@torch.no_grad()
def measure_moa(
    pipeline: MoAPipeline,
    readout: Readout,
    case: Case,
    subject_cfg: float | None = None,
    sparse: bool = True,
    prior: Tensor | None = None,
) -> Figures:
    """What they see in MoA's, with each reference and its exchange; prior: the prior's pictures, to compare with."""
    figures, both, started = Figures(), [], time.monotonic()
    for one in (case, case.exchanged()):
        both.append(draw(pipeline, one, subject_cfg=subject_cfg, sparse=sparse))
    figures.add("seconds", torch.tensor([time.monotonic() - started]) / (2 * PER_PROMPT))
    people = [readout.people(drawn.pictures) for drawn in both]
    for one, drawn, where in zip((case, case.exchanged()), both, people, strict=True):
        judge(figures, readout, one, drawn.pictures)
        judge_routers(figures, where, drawn.area)
        if prior is not None:
            judge_change(figures, where | readout.people(prior), drawn.pictures, prior, "from prior")
        figures.add("calls", torch.tensor([drawn.calls]))
        if drawn.asked is not None:
            figures.add("asked", torch.tensor([drawn.asked]))
    judge_change(figures, people[0] | people[1], both[0].pictures, both[1].pictures)
    if len(case.references) == 1:  # the n-th exchanged picture shows whom the n + 1st shows before
        judge_layout(figures, people[1], people[0].roll(-1, 0))
    return figures
