"""MoA beside what it is compared with, in the toy world: trained on the same records, judged on the same prompts.

Every row learns anew from configs/toy.yaml for as many steps, at a rate that falls to nothing over their second half,
goes on where it was stopped, and is judged as by training.toy.measure. The prior is drawn once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from moa_core.adapters.ip_adapter_file import IPAdapter
from moa_core.files.whole_file import write_whole
from moa_core.learned.moa_file import load_moa
from moa_core.subjects.subject import Subject
from toy_world.draw import draw_person
from training.config import Config
from training.evaluation.statistics import interval, ratio_interval
from training.finetune.checkpoint import checkpoints, read_state
from training.finetune.contact_sheet import sheet
from training.finetune.loop import train
from training.finetune.methods import as_ip_adapter
from training.finetune.trained import trained_pipeline
from training.host.base import Base
from training.host.pipeline import MoAPipeline
from training.host.pretrained import load_base
from training.host.schedule import TIMESTEPS
from training.toy.cases import CFG, PER_PROMPT, Case, cases, draw
from training.toy.figures import Figures, measure_moa, measure_prior
from training.toy.judges import Readout, accuracy
from training.toy.renders import CONTEXT, IDENTITY, TEST, TEST_SCENES, draw_renders

STEPS = 2000
SINGLES, PAIRS = 18, 6
"""Prompts of one person and of two."""
SHOWN = (0, 5, 9, 16, 19, 21)
"""The prompts on the contact sheet."""

SHIPPED = Path(__file__).parents[2] / "models/moa/moa-toy.safetensors"

Estimate = tuple[float, float, float]
"""A figure and its 95% interval."""


@dataclass(frozen=True)
class Contender:
    """A row of the table: what it changes in the configuration, and how it is sampled."""

    name: str
    folder: str | None
    """Its run's; rows of one folder share their weights. None: the weights that ship with the pack."""
    model: dict = field(default_factory=dict)
    loss: dict = field(default_factory=dict)
    subject_cfg: float | None = None
    sparse: bool = False
    by_words: bool = False
    """An IP-Adapter, routed by words as MoA From IP-Adapter does it."""


IP_ADAPTER = {"model": {"method": "ip_adapter"}, "loss": {"router": 0.0, "object": 0.0, "masked": 0.0}}
CONTENDERS = (
    Contender("MoA", "moa"),
    Contender("MoA without spacetime conditioning", "moa_without_spacetime", {"method": "moa_without_spacetime"}),
    Contender("MoA without the router loss", "moa_without_router_loss", loss={"router": 0.0}),
    Contender("no MoA layer", "cross_attention", {"method": "cross_attention"}),
    # FastComposer masks the loss of every second record, learns on all timesteps and localizes eleven of sixteen
    # blocks; IP-Adapter masks no loss, and knows neither routers nor words.
    Contender(
        "FastComposer-like",
        "fastcomposer",
        {"method": "fastcomposer"},
        {"router": 0.0, "masked": 0.5, "timesteps": TIMESTEPS, "object_blocks": "routed"},
    ),
    Contender("IP-Adapter-like", "ip_adapter", **IP_ADAPTER),
    Contender("IP-Adapter-like, routed by words", "ip_adapter", **IP_ADAPTER, by_words=True),
    Contender("MoA, three-term guidance", "moa", subject_cfg=CFG),
    Contender("MoA, sparse", "moa", sparse=True),
    Contender("MoA, as shipped", None),
)


def configuration(row: Contender, config: Config, run: Path, steps: int, seed: int = 0) -> Config:
    """The row's own: the same data, steps and batch, its method and losses."""
    return replace(
        config,
        model=replace(config.model, **row.model),
        loss=replace(config.loss, **row.loss),
        optimizer=replace(config.optimizer, steps=steps, cooldown=steps // 2),
        run=replace(config.run, out=str(run / f"{row.folder}-{seed}"), seed=seed, validate_every=0, keep=1),
    )


def pipelines(row: Contender, config: Config, run: Path, steps: int, seeds: int) -> Iterator[MoAPipeline]:
    """The row's models, one of each seed, ready to sample; trained first where they are not."""
    if row.folder is None:
        base, moa = load_base(config.model.base), load_moa(SHIPPED)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        yield MoAPipeline(base.to(device), moa.to(device))
        return
    for seed in range(seeds):
        trained = train_row(configuration(row, config, run, steps, seed))
        yield WordRouted(trained, load_base(config.model.base)) if row.by_words else trained


class WordRouted(MoAPipeline):
    """What `ip_adapter` has learnt, each person where the prior draws their word."""

    def __init__(self, trained: MoAPipeline, base: Base):
        """base: another copy of the trained one's."""
        adapter = as_ip_adapter(trained.moa)
        super().__init__(base.to(trained.device), IPAdapter(adapter.mixture.to(trained.device), adapter.projector))
        self.trained = trained

    @torch.no_grad()
    def encode_subject(self, *pictures, **masks) -> Subject:
        subject = self.trained.encode_subject(*pictures, **masks)
        return replace(subject, features=self.moa.projector(subject.features).flatten(1))


def train_row(config: Config) -> MoAPipeline:
    """Train to the last step, from the newest checkpoint if there is one; ready to sample."""
    folder = Path(config.run.out) / "checkpoints"
    newest = (checkpoints(folder) or [None])[-1]
    if newest is not None and read_state(newest)["config"] != config.to_dict():
        raise ValueError(f"{folder} was trained with another configuration, or for other steps: give another --run")
    if newest is None or read_state(newest)["step"] < config.optimizer.steps:
        train(config, newest)
        newest = checkpoints(folder)[-1]
    if read_state(newest)["step"] < config.optimizer.steps:
        raise ValueError(f"{folder}: stopped at {newest.name}; the same command goes on")
    return trained_pipeline(config, newest)


def compare(
    config: Config,
    run: Path,
    steps: int = STEPS,
    seeds: int = 1,
    singles: int = SINGLES,
    pairs: int = PAIRS,
    contenders: Sequence[Contender] = CONTENDERS,
) -> dict:
    """Train and judge the rows; figures and the contact sheet `evidence.png` go into the run's folder."""
    readout, everything = Readout.load(), list(cases(singles, pairs))
    renders = accuracy(readout, draw_renders(0, TEST, TEST_SCENES))
    ceiling = float(np.mean([renders[name] for name in IDENTITY]))
    shown = [everything[n] for n in SHOWN if n < len(everything)]
    prior: list[Figures] = []
    priors: list[Tensor] = []  # its pictures of every prompt
    rows: dict[str, dict[str, Estimate | None]] = {}
    pictures: list[list[Tensor]] = [[reference for case in shown for reference in _references(case)]]
    for row in contenders:
        figures: list[Figures] = []
        for pipeline in pipelines(row, config, run, steps, seeds):
            if not prior:
                measured = [measure_prior(pipeline, readout, case) for case in tqdm(everything, desc="prior")]
                prior, priors = (list(column) for column in zip(*measured, strict=True))
                rows["prior"] = columns(prior, prior, ceiling)
                pictures.append(_pictures(pipeline, shown, strength=0.0))
            if not figures:
                pictures.append(_pictures(pipeline, shown, subject_cfg=row.subject_cfg, sparse=row.sparse))
            figures += [
                measure_moa(pipeline, readout, case, row.subject_cfg, row.sparse, drawn)
                for case, drawn in zip(tqdm(everything, desc=row.name, unit="prompt"), priors, strict=True)
            ]
        rows[row.name] = columns(figures, prior * (len(figures) // len(prior)), ceiling)
    sheet([torch.stack(row) for row in pictures], run / "evidence.png")
    result = {
        "steps": steps,
        "batch": config.optimizer.batch,
        "seeds": seeds,
        "prompts": [singles, pairs],
        "pictures": 2 * PER_PROMPT * len(everything),
        "ceiling": ceiling,
        "rows": rows,
    }
    write_whole(run / "evidence.json", json.dumps(result, indent=1).encode())
    return result


def columns(figures: list[Figures], prior: list[Figures], ceiling: float) -> dict[str, Estimate | None]:
    """The table's columns from the figures of every prompt (of every seed); for the intervals these are drawn."""
    identity, context = _means(figures, *IDENTITY) / ceiling, _means(figures, *CONTEXT)
    usual = _means(prior, *CONTEXT)
    estimates: dict[str, Estimate | None] = {
        "identity": interval(identity),
        "prompt": ratio_interval(context, usual),
        "mean": interval((identity + context / usual.mean()) / 2),
        "background": None,
        "prior_outside": None,
        "prior_inside": None,
        "layout": ratio_interval(_means(figures, "layout"), _means(prior, "layout")),
        "leak": interval(_means(figures, "leak")),
        "assigned": interval(_means(figures, "assigned")),
        "calls": interval(_means(figures, "calls")),
        "seconds": interval(_means(figures, "seconds")),
    }
    if figures is not prior:  # which knows no reference that could be exchanged
        sides = ("change outside", "change inside")
        parted = [each for each in figures if all(each.counts[side] for side in sides)]  # a picture may be all person
        estimates["background"] = ratio_interval(*(_means(parted, side) for side in sides)) if parted else None
        for side in ("outside", "inside"):
            estimates[f"prior_{side}"] = interval(_means(figures, f"from prior {side}"))
    return estimates


def _means(parts: list[Figures], *names: str) -> np.ndarray:
    """[prompts]: the mean of these figures in every prompt that has them."""
    there = [part for part in parts if part.counts[names[0]]]
    return np.array([sum(p.sums[k] for k in names) / sum(p.counts[k] for k in names) for p in there])


def _references(case: Case) -> Iterator[Tensor]:
    """What the pictures of a prompt refer to, [3, H, W] in -1..1 each; two people share a picture."""
    drawn = []
    for person, identities in zip(case.scene.people, case.references, strict=True):
        image, _ = draw_person(identities[0], person.word)
        drawn.append(torch.from_numpy(np.array(image)).movedim(-1, 0).float() / 127.5 - 1)
    if len(drawn) == 2:
        halves = [F.interpolate(one[None], scale_factor=(1.0, 0.5), mode="area")[0] for one in drawn]
        drawn = [torch.cat(halves, dim=2)]
    yield from drawn


def _pictures(pipeline: MoAPipeline, shown: list[Case], **options) -> list[Tensor]:
    with torch.no_grad():
        return [draw(pipeline, case, **options).pictures[0] for case in shown]
