"""python -m training.toy.measure: what MoA does in the toy world, in figures.

Thirty prompts for one person and ten for two (cases.py), drawn by the prior and by MoA, routed densely and sparsely,
with people that no training has seen, and again with the references exchanged. The judges (judges.py) were trained on
renders alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from tqdm import tqdm

from moa_core.learned.moa_file import load_moa
from training.host.pipeline import MoAPipeline
from training.host.pretrained import load_base
from training.toy.cases import PAIRS, PER_PROMPT, SINGLES, cases
from training.toy.figures import Figures, measure_moa, measure_prior
from training.toy.judges import JUDGES, Readout, accuracy
from training.toy.renders import CONTEXT, IDENTITY, TEST, TEST_SCENES, draw_renders

ROUTINGS = ("dense", "sparse")


def measure(pipeline: MoAPipeline, readout: Readout, subject_cfg: float | None = None) -> dict:
    """Every figure, on prompts and people that are always the same; subject_cfg: see MoAPipeline."""
    started = time.monotonic()
    renders = accuracy(readout, draw_renders(0, TEST, TEST_SCENES))
    print("judges on held-out renders:", ", ".join(f"{k} {v:.3f}" for k, v in renders.items()), flush=True)
    figures: dict[str, list[Figures]] = {"prior": [], "dense": [], "sparse": []}
    for case in tqdm(list(cases()), desc="sampling", unit="prompt"):
        seen, pictures = measure_prior(pipeline, readout, case)
        figures["prior"].append(seen)
        for routing in ROUTINGS:
            sparse = routing == "sparse"
            figures[routing].append(measure_moa(pipeline, readout, case, subject_cfg, sparse, pictures))
    return {
        "renders": {name: round(value, 4) for name, value in renders.items()},
        **{who: Figures.total(parts).all() for who, parts in figures.items()},
        "pictures": 5 * PER_PROMPT * (SINGLES + PAIRS),
        "seconds": round(time.monotonic() - started),
    }


def table(result: dict) -> str:
    """The figures for people to read."""
    drawers = ("renders", "prior", *ROUTINGS)
    lines = [f"{'share of right answers':36}" + "".join(f"{who:>9}" for who in drawers)]
    names = {name: name for name in (*CONTEXT, *IDENTITY)}
    names |= {"assigned": "two people at the right words", "leak": "one of two shows the other's"}
    for key, name in names.items():
        lines.append(f"{name:36}" + "".join(f"{_number(result[who].get(key)):>9}" for who in drawers))
    lines.append("(the prior knows no reference: its identity and its words of two people are what chance gives)")
    varied = "".join(f"{_number(result[who].get('layout')):>9}" for who in drawers)
    lines += ["", f"{'layouts, 1 - overlap from seed to seed':36}{varied}", ""]
    lines.append(f"{'in the subjects and elsewhere':36}{'inside':>9}{'outside':>9}{'ratio':>9}")
    parts = {"change": "change, references exchanged", "from prior": "change, prior to MoA", "router": "expert's share"}
    for key, name in parts.items():
        for routing in ROUTINGS:
            inside, outside = (result[routing][f"{key} {side}"] for side in ("inside", "outside"))
            ratio = outside / inside if inside and outside is not None else None
            lines.append(f"{f'{name}, {routing}':36}{_number(inside):>9}{_number(outside):>9}{_number(ratio):>9}")
    asked = _number(result["sparse"].get("asked"))
    lines += ["", f"pixels through the expert, sparse, after the beginning: {asked} of all"]
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
