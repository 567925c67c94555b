"""What trained routers say: the shipped toy MoA's shares, by kind of layer, where its subjects are and elsewhere."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from moa_core.learned.moa_file import load_moa
from moa_core.routing.subject_area import mean_share, routed_blocks, two_classes
from moa_core.run import Call
from training.comfyui import PACK
from training.host.pipeline import MoAPipeline
from training.host.pretrained import load_base
from training.toy.cases import cases, subjects_of

Kind = tuple[bool, str]
"""Whether the block is routed, and which attention."""
QUANTILES = 256


@dataclass
class TrainedShares:
    """Quantiles of the shares under a positive prompt, in steps after the beginning."""

    inside: dict[Kind, Tensor]
    outside: dict[Kind, Tensor]

    @classmethod
    def of_shipped(cls, prompts: int = 4) -> TrainedShares:
        """Measured on the first prompts of toy.measure; the area is that of the whole run."""
        models = PACK / "models"
        base = load_base(models / "checkpoints/moa-toy-base.safetensors")
        pipeline = MoAPipeline(base, load_moa(models / "moa/moa-toy.safetensors"))
        found = {True: defaultdict(list), False: defaultdict(list)}
        for case in cases(singles=prompts, pairs=0):
            calls: list[dict] = []

            def watch(call: Call, calls=calls) -> None:
                calls.append({layer: share.chunk(2)[0] for layer, share in call.learned.wanted.items()})

            pipeline(case.scene.caption, subjects_of(pipeline, case), steps=12, cfg=4.0, seed=case.seed, watch=watch)
            late = calls[3:]
            size = next(iter(late[0].values())).shape[1:]
            area = two_classes(
                torch.stack([mean_share(shares, size, pipeline.blocks)[0] for shares in late]).mean(dim=0)
            )
            routed = routed_blocks(list(pipeline.blocks))
            for shares in late:
                for (address, attention), share in shares.items():
                    there = torch.nn.functional.adaptive_max_pool2d(area[None], share.shape[1:])[0] > 0
                    for side in (True, False):
                        found[side][address in routed, attention].append(share[0][there == side])
        levels = torch.linspace(0, 1, QUANTILES)
        quantiles = {
            side: {kind: torch.cat(shares).quantile(levels) for kind, shares in kinds.items()}
            for side, kinds in found.items()
        }
        return cls(quantiles[True], quantiles[False])

    def draw(self, kind: Kind, side: int, area: float, seed: int) -> Tensor:
        """Shares [side * side] of a layer, with subjects on a square in the middle that has that part of it.

        Where the shipped MoA has no expert in layers of that kind, those of the routed blocks' are taken.
        """
        kind = kind if kind in self.inside else (True, kind[1])
        random = torch.Generator().manual_seed(seed)
        place = torch.randint(QUANTILES, (side, side), generator=random)
        return torch.where(square(side, area), self.inside[kind][place], self.outside[kind][place]).flatten()

    def __str__(self) -> str:
        lines = ["shares of the shipped MoA's experts, mean inside and outside its subjects:"]
        for (routed, attention), inside in sorted(self.inside.items(), reverse=True):
            name = f"{'routed' if routed else 'other'} blocks, {attention}"
            lines.append(f"  {name:22}{inside.mean():6.2f}{self.outside[routed, attention].mean():6.2f}")
        return "\n".join(lines)


def square(side: int, area: float) -> Tensor:
    """bool [side, side]: the square in the middle that is that part of it."""
    edge = (torch.arange(side) + 0.5 - side / 2).abs() <= area**0.5 * side / 2
    return edge[:, None] & edge
