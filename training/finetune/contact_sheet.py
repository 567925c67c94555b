"""The contact sheet of a finetune: what the MoA does with people it never trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from moa_core.files.whole_file import whole
from moa_core.subjects.binding import Binding
from moa_core.subjects.reference import MEAN, STD
from moa_core.subjects.subject import Subject
from training.data.batch import Batch
from training.host.pipeline import MoAPipeline

STEPS, CFG = 20, 4.0


@torch.no_grad()
def draw_contact_sheet(pipeline: MoAPipeline, batch: Batch, path: Path) -> None:
    """One column for each record: its picture, up to two references, prior, MoA, the routers' share."""
    columns = [_column(pipeline, batch, n) for n in range(len(batch.captions))]
    sheet([torch.stack(row) for row in zip(*columns, strict=True)], path)


def _column(pipeline: MoAPipeline, batch: Batch, n: int) -> list[Tensor]:
    """Pictures [3, H, W] in -1..1."""
    side = batch.pictures.shape[-1]
    there = [place for place in range(batch.positions.shape[1]) if batch.positions[n, place] >= 0]
    references = [batch.references[n, place] for place in there][:2]
    contexts = [pipeline.encode_prompt(text) for text in (batch.captions[n], "")]
    bindings = []
    for place in there:
        features = pipeline.moa.encode(batch.references[n, place, None])[None]
        bindings.append(Binding(int(batch.positions[n, place]), Subject(features, "", "")))
    prior, _ = pipeline.sample(*contexts, steps=STEPS, cfg=CFG, seed=n, strength=0.0)
    drawn, trace = pipeline.sample(*contexts, bindings, steps=STEPS, cfg=CFG, seed=n)
    share = F.interpolate(trace.subject_area()[:, None], (side, side))[0].expand(3, -1, -1) * 2 - 1
    shown = [_show_reference(r, side) for r in references]
    shown += [torch.zeros(3, side, side)] * (2 - len(shown))
    return [batch.pictures[n].cpu(), *shown, *(p[0].movedim(-1, 0) * 2 - 1 for p in (prior, drawn)), share]


def _show_reference(reference: Tensor, side: int) -> Tensor:
    """A prepared reference [3, R, R] as a picture [3, side, side] in -1..1."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    picture = (reference.cpu() * std + mean).clamp(0, 1) * 2 - 1
    return F.interpolate(picture[None], (side, side), mode="bilinear")[0]


def sheet(rows: Sequence[Tensor], path: Path) -> None:
    """A contact sheet: rows of pictures [B, 3, H, W] in -1..1, written whole or not at all."""
    from torchvision.utils import make_grid, save_image

    grid = make_grid(torch.cat(list(rows)).float().cpu() / 2 + 0.5, nrow=len(rows[0]), padding=2)
    with whole(path) as unfinished:
        save_image(grid.clamp(0, 1), unfinished)
