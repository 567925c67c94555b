"""RESULTS.md: the evidence for people to read."""

from __future__ import annotations

from pathlib import Path

from training.toy.comparison import CONTENDERS, Estimate

PICTURE = "RESULTS.jpg"
FINDINGS = Path(__file__).with_name("findings.md")
"""What no table says, written by hand; the end of RESULTS.md."""
JUDGED = ("MoA", "MoA, as shipped")
BASELINES = ("FastComposer-like", "IP-Adapter-like")
UNROUTED, ROUTED = "IP-Adapter-like", "IP-Adapter-like, routed by words"
GOALS = {
    "identity": (True, 0.90),
    "prompt": (True, 0.98),
    "background": (False, 0.10),
    "prior_outside": (False, 0.03),
    "leak": (False, 0.02),
}
"""What MoA was meant to reach: at least (True) or at most."""
ROUTING_GOALS = (
    ("change outside / inside at most half of the unrouted", "background", UNROUTED, False, 0.5),
    ("two at the right words at least 0.8 (unrouted: chance)", "assigned", None, True, 0.8),
    ("identity at least 0.9 of the unrouted", "identity", UNROUTED, True, 0.9),
)
"""In words; the column, the row it is a share of (None: itself), at least or at most what."""
MORE, LESS = ("identity", "prompt", "mean", "layout", "assigned"), ("background", "prior_outside", "leak", "calls")
"""Columns in which more, and in which less, is better."""
HEADINGS = {
    "identity": "identity, share of the ceiling",
    "prompt": "prompt, share of the prior's",
    "mean": "mean of both",
    "background": "change outside / inside",
    "prior_outside": "change from the prior, outside",
    "prior_inside": "and inside",
    "layout": "layout variety, share of the prior's",
    "leak": "leak between two",
    "assigned": "two at the right words",
    "calls": "U-Net calls per image",
    "seconds": "seconds per image",
}


EXPLANATION = (
    "*Identity*: right answers about skin, hair, style, glasses and beard, of the judges' own share on renders "
    "(the ceiling). *Prompt*: right answers about scene, action and age, of the prior's. *Change*: mean absolute "
    "change of the background over that of the people when a reference is exchanged. *Change from the prior*: mean "
    "absolute change (of a range of 1) against the prior's picture of the same noise. *Layout variety*: how "
    "differently people stand from seed to seed, 1 - overlap. *Leak*: of what tells two people apart, how much one "
    "shows of the other. *Two at the right words*: chance is 0.5. *U-Net calls* each hold a picture with and without "
    "the prompt. *Seconds* are of the machine that made this table.",
    "",
    "*No MoA layer* is MoA with cross-attention finetuned in place of the MoA layers, and the same losses. "
    "*FastComposer-like* shares with FastComposer that attention is finetuned in place, a subject that is the same in "
    "every layer and timestep, a loss that is masked in half of the records, the blocks of the object loss, and "
    "subjects that come in after the first fifth of the sampling; not its training of the whole U-Net (all but "
    "attention stays the prior's), nor its own layers that fuse word and picture, nor its learning rate. "
    "*IP-Adapter-like* adds attention to image tokens beside the frozen prior's, with an unmasked loss. *Routed by "
    "words* are the same weights as MoA From IP-Adapter uses such a file: each person where the prior draws their "
    "word. *Three-term guidance* is ours, not the paper's: `uncond + cfg (prior - uncond) + cfg (moa - prior)` with "
    "MoA's own weights. "
    "*Sparse* asks the experts in the subject area alone; all other rows are dense, as in the paper.",
)


def report(result: dict) -> str:
    """All of it in Markdown: how it was made, the table, which goals MoA reached, the contact sheet's rows."""
    rows = result["rows"]
    singles, pairs = result["prompts"]
    left_out = [row.name for row in CONTENDERS if row.name not in rows]
    lines = [
        "# MoA and its baselines in the toy world",
        "",
        "Made by `python -m training.evaluate toy`. Every method learnt from the same start, on the same records, for "
        f"{result['steps']} steps of {result['batch']}, at a rate that falls to nothing over their second half"
        f"{_seeds(result['seeds'])}; *MoA, as shipped* is the one that comes with the pack, trained longer "
        "([its card](../models/moa/moa-toy.md)). "
        f"{singles} prompts of one person and {pairs} of two, {result['pictures']} pictures each, of people "
        "that no training has seen. In brackets the 95% interval, from drawing prompts anew "
        f"{'(of each seed) ' if result['seeds'] > 1 else ''}(bootstrap, seed 0).",
        "",
    ]
    if left_out:
        lines += [f"**Not trained for this table** (`--rows`): {'; '.join(left_out)}.", ""]
    lines += ["| | " + " | ".join(HEADINGS.values()) + " |", "|---" * (len(HEADINGS) + 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(_cell(row[column]) for column in HEADINGS) + " |")
    lines += ["", *EXPLANATION, "", *_goals(rows)]
    if {UNROUTED, ROUTED} <= rows.keys():
        lines += ["", *_goals_of_routing(rows)]
    lines += ["", f"![The same prompts and noise in every row]({PICTURE})", "", "From top to bottom: references, "]
    lines[-1] += ", ".join(rows) + "."
    return "\n".join([*lines, "", FINDINGS.read_text(encoding="utf-8")])


def _goals(rows: dict) -> list[str]:
    judged = [name for name in JUDGED if name in rows]
    lines = ["| goal set before training | " + " | ".join(judged) + " |", "|---" * (len(judged) + 1) + "|"]
    for column, (least, goal) in GOALS.items():
        reached = [_verdict(rows[name][column][0], least, goal) for name in judged]
        lines.append(f"| {HEADINGS[column]} {'>=' if least else '<='} {goal:.2f} | {' | '.join(reached)} |")
    if {"MoA", *BASELINES} <= rows.keys():
        longer = " trained longer than they |" * (len(judged) - 1)
        ahead = _ahead(rows["MoA"]["mean"], [rows[name]["mean"] for name in BASELINES])
        lines.append(f"| ahead of both baselines on the mean of both | {ahead} |{longer}")
        behind = [HEADINGS[column] for column in (*MORE, *LESS) if _behind(column, rows)]
        level = f"missed: behind in {'; '.join(behind)}" if behind else "met"
        lines.append(f"| first or level with them in every column but seconds | {level} |{longer}")
    return lines


def _goals_of_routing(rows: dict) -> list[str]:
    lines = ["| goal set for routing by words | reached |", "|---|---|"]
    for text, column, against, least, goal in ROUTING_GOALS:
        value = _share(rows[ROUTED][column], rows[against][column] if against else (1.0, 1.0, 1.0))
        lines.append(f"| {text} | {'-' if value is None else _verdict(value, least, goal)} |")
    return lines


def _seeds(seeds: int) -> str:
    return "" if seeds == 1 else f", with {seeds} seeds each"


def _behind(column: str, rows: dict) -> bool:
    """Whether all of a baseline's interval is better than all of MoA's."""
    _, low, high = rows["MoA"][column]
    others = [rows[name][column] for name in BASELINES]
    return any(other[1] > high if column in MORE else other[2] < low for other in others)


def _cell(estimate: Estimate | None) -> str:
    return "-" if estimate is None else "{:.2f} ({:.2f} to {:.2f})".format(*estimate)


def _verdict(value: float, least: bool, goal: float) -> str:
    met = value >= goal if least else value <= goal
    return f"{value:.2f}, {'met' if met else 'missed'}"


def _share(ours: Estimate | None, whole: Estimate | None) -> float | None:
    return None if ours is None or whole is None or not whole[0] else ours[0] / whole[0]


def _ahead(ours: Estimate, others: list[Estimate]) -> str:
    """Met only where no other's interval reaches ours."""
    if ours[0] <= max(mean for mean, _, _ in others):
        return "missed"
    return "met" if ours[1] > max(high for _, _, high in others) else "not decided: the intervals overlap"
