"""Which experts matter: each layer's is left out in turn, and the people in the pictures are seen to move or not.

Stable Flow (Avrahami et al., 2024, arXiv 2411.14430, section 3.1) finds the vital layers of a diffusion transformer in
this way; here a layer without an expert is the prior's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from moa_core.address import Layer
from moa_core.learned.moa import MoA
from moa_core.routing.subject_area import two_classes
from moa_core.routing.trace import Trace
from moa_core.subjects.binding import Binding
from moa_core.subjects.reference import prepare_reference
from moa_core.subjects.subject import Subject
from training.data.batch import bound_positions
from training.data.dataset import SubjectDataset
from training.data.preparation import Preparation
from training.host.base import Base
from training.host.pipeline import MoAPipeline

STEPS, CFG = 12, 4.0


@dataclass(frozen=True)
class Drawn:
    """Pictures of the same prompts, people and noise."""

    pictures: Tensor
    """[B, 3, H, W] in -1..1."""
    people: Tensor
    """[B, H, W] in 0..1: where the subjects are."""


@dataclass(frozen=True)
class Moved:
    """How far people moved who were drawn with experts missing, from those that all experts draw."""

    seen: float
    """What is seen of them, as a part of how far the prior's own people are from theirs."""
    pixels: float
    """Mean absolute difference within them, of a range of 1."""


class Viewer(ABC):
    """Draws always the same, and says what is to be seen of the people in it."""

    def __init__(self, base: Base):
        self.base = base

    def pipeline(self, moa: MoA) -> MoAPipeline:
        """With this MoA beside the base model, in the place of the last one."""
        return MoAPipeline(self.base, moa.to(next(self.base.unet.parameters()).device))

    @abstractmethod
    def draw(self, moa: MoA, strength: float = 1.0) -> Drawn:
        """strength 0 is the prior alone."""

    @abstractmethod
    def see(self, drawn: Drawn, people: Tensor) -> Tensor:
        """[B, F]: who is there, within people [B, H, W]."""


class RecordsViewer(Viewer):
    """Draws the captions of a data set's test records; the MoA's own image encoder sees the people."""

    def __init__(self, base: Base, moa: MoA, data: Path, prompts: int, seed: int = 0):
        """Raises EmptySplit, or what else a data set without usable records raises."""
        super().__init__(base)
        self.encoder = moa
        preparation = Preparation(base.picture_size, moa.image_encoder.size, augment=False)
        records = SubjectDataset(data, preparation, "test", seed)
        self.records = [records[n] for n in range(min(prompts, len(records)))]

    def draw(self, moa: MoA, strength: float = 1.0) -> Drawn:
        pipeline = self.pipeline(moa)
        negative = pipeline.encode_prompt("")
        drawn = [self._draw(pipeline, record, n, negative, strength) for n, record in enumerate(self.records)]
        return Drawn(*(torch.stack(each) for each in zip(*drawn, strict=True)))

    def _draw(
        self, pipeline: MoAPipeline, record: dict, seed: int, negative: Tensor, strength: float
    ) -> tuple[Tensor, Tensor]:
        bindings = [
            Binding(position, Subject(pipeline.moa.encode(reference[None].to(pipeline.device))[None].cpu(), "", ""))
            for position, reference in zip(bound_positions(record), record["references"], strict=True)
            if position >= 0
        ]
        prompt, options = pipeline.encode_prompt(record["caption"]), {"steps": STEPS, "cfg": CFG, "seed": seed}
        pictures, trace = pipeline.sample(prompt, negative, bindings, strength=strength, sparse=False, **options)
        side = pictures.shape[1]
        return pictures[0].movedim(-1, 0) * 2 - 1, people_of(trace, side)

    def see(self, drawn: Drawn, people: Tensor) -> Tensor:
        size, device = self.encoder.image_encoder.size, next(self.encoder.parameters()).device
        cut = [
            prepare_reference(picture.movedim(0, -1) / 2 + 0.5, mask, size)
            for picture, mask in zip(drawn.pictures, people, strict=True)
        ]
        return F.normalize(self.encoder.image_encoder(torch.stack(cut).to(device)).float().cpu(), dim=1)


def people_of(trace: Trace, side: int) -> Tensor:
    """[side, side] of 0 and 1: where the routers have put the subjects; everywhere, where they have put nobody."""
    if not trace:
        return torch.ones(side, side)
    area = two_classes(trace.subject_area()[0])
    return F.interpolate((area if area.any() else torch.ones_like(area))[None, None], (side, side))[0, 0]


class Vital:
    """Movements of the people as experts are left out of a MoA."""

    def __init__(self, moa: MoA, viewer: Viewer):
        self.moa, self.viewer = moa, viewer
        self.whole = viewer.draw(moa)
        self.all_seen = viewer.see(self.whole, self.whole.people)
        self.way = float((self._seen(viewer.draw(moa, strength=0.0)) - self.all_seen).norm(dim=1).mean())
        if self.way < 1e-4:
            raise ValueError(
                "with and without this MoA the same people are drawn: no layer of it is vital, train it first"
            )

    def without(self, layers: Sequence[Layer]) -> Moved:
        """Of pictures drawn with no expert in these layers."""
        kept = [layer for layer in self.moa.config.layers if layer not in layers]
        drawn = self.viewer.draw(self.moa.with_experts_in(kept))
        seen = float((self._seen(drawn) - self.all_seen).norm(dim=1).mean()) / self.way
        change = (drawn.pictures - self.whole.pictures).abs().mean(dim=1) / 2  # [B, H, W]
        return Moved(seen, float((change * self.whole.people).sum() / self.whole.people.sum()))

    def _seen(self, drawn: Drawn) -> Tensor:
        return self.viewer.see(drawn, self.whole.people)

    def each(self, tell: Callable[[Layer, Moved], None]) -> list[Layer]:
        """Leaves out each layer in turn and tells; -> all of them, the least vital first."""
        moved = {}
        for layer in self.moa.config.layers:
            if [layer] != [other for other in self.moa.config.layers if other[1] == "attn2"]:  # the only voice of all
                moved[layer] = self.without([layer])
                tell(layer, moved[layer])
        return sorted(moved, key=lambda layer: moved[layer].seen)

    def within(self, loss: float, order: Sequence[Layer]) -> list[Layer]:
        """As many of the least vital as may be left out together, so that people move by `loss` at most."""
        fewest, most = 0, len(order) + 1
        while most - fewest > 1:
            tried = (fewest + most) // 2
            if droppable(self.moa, order[:tried]) and self.without(order[:tried]).seen <= loss:
                fewest = tried
            else:
                most = tried
        return list(order[:fewest])


def droppable(moa: MoA, layers: Sequence[Layer]) -> bool:
    """Whether anything would still read the subjects without these."""
    return any(layer[1] == "attn2" and layer not in layers for layer in moa.config.layers)
