"""Vital layers in the toy world: the judges see who is in the pictures."""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor

from moa_core.learned.moa import MoA
from training.evaluation.vital_layers import Drawn, Viewer
from training.host.base import Base
from training.toy.cases import cases, draw
from training.toy.judges import Readout
from training.toy.renders import IDENTITY, views


class ToyViewer(Viewer):
    """Draws prompts of training.toy.measure, a third of them of two people."""

    def __init__(self, base: Base, prompts: int):
        super().__init__(base)
        self.readout = Readout.load()
        pairs = prompts // 3
        self.cases = list(islice(cases(singles=prompts - pairs, pairs=pairs), prompts))

    def draw(self, moa: MoA, strength: float = 1.0) -> Drawn:
        pipeline = self.pipeline(moa)
        pictures = torch.cat([draw(pipeline, case, strength, sparse=False).pictures for case in self.cases])
        return Drawn(pictures, self.readout.people(pictures).float())

    @torch.no_grad()
    def see(self, drawn: Drawn, people: Tensor) -> Tensor:
        per_case = drawn.pictures.split(len(drawn.pictures) // len(self.cases))
        seen = []
        for case, pictures in zip(self.cases, per_case, strict=True):
            answers = [self.readout(view) for view in views(pictures, len(case.scene.people))]
            sides = [torch.cat([logits[name].softmax(dim=1) for name in IDENTITY], dim=1) for logits in answers]
            seen.append(torch.cat(sides, dim=1) / len(sides) ** 0.5)
        width = max(each.shape[1] for each in seen)
        return torch.cat([torch.nn.functional.pad(each, (0, width - each.shape[1])) for each in seen])
