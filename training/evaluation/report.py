"""An evaluation's figures: means with intervals, of prior and method, over all pictures and for each prompt."""

from __future__ import annotations

from training.evaluation.judges import Score
from training.evaluation.shots import Shot
from training.evaluation.statistics import DRAWS, ratio_interval

METRICS = ("identity", "prompt_consistency")


def result_of(shots: list[Shot], rows: dict[str, list[Score]], prompts: list[str], settings: dict) -> dict:
    """result.json: for every row the figures of all pictures, and of each prompt's."""
    subjects = len({shot.people[0].name for shot in shots})
    # A subject's pictures resemble each other; with a single subject there is nothing but its pictures to draw.
    groups = f"{subjects} subjects (a picture of several counts for its first)" if subjects > 1 else "the pictures"
    return {
        "interval": f"95%, percentile bootstrap over {groups}, {DRAWS} draws",
        "rows": {name: _row(list(zip(shots, scores, strict=True)), prompts) for name, scores in rows.items()},
        "settings": settings,
    }


def _row(scored: list[tuple[Shot, Score]], prompts: list[str]) -> dict:
    return {
        "all": _figures(scored),
        "prompts": [
            {"prompt": prompt} | _figures([one for one in scored if one[0].number == number])
            for number, prompt in enumerate(prompts)
        ],
    }


def _figures(scored: list[tuple[Shot, Score]]) -> dict:
    """Each metric's mean and interval; groups are subjects, or pictures where there is one subject."""
    names = [shot.people[0].name for shot, _ in scored]
    members = [[n for n, other in enumerate(names) if other == name] for name in sorted(set(names))]
    if len(members) == 1:
        members = [[n] for n in range(len(scored))]
    figures = {"pictures": len(scored), "face_missing": sum(score.face_missing for _, score in scored)}
    for metric in METRICS:
        values = [getattr(score, metric) for _, score in scored]
        sums = [sum(values[n] for n in group) for group in members]
        mean, low, high = ratio_interval(sums, [len(group) for group in members])
        figures[metric] = {"mean": mean, "low": low, "high": high}
    return figures


def table(result: dict) -> str:
    """result.md: the figures for people to read."""
    lines = ["| | prompt | identity preservation | prompt consistency | pictures | a face missing |", "|---" * 6 + "|"]
    rows = [(name, row["all"] | {"prompt": "all"}) for name, row in result["rows"].items()]
    rows += [(name, prompt) for name, row in result["rows"].items() for prompt in row["prompts"]]
    for name, row in rows:
        cells = [f"{row[m]['mean']:.3f} ({row[m]['low']:.3f} to {row[m]['high']:.3f})" for m in METRICS]
        counts = f"{row['pictures']} | {row['face_missing']}"
        lines.append(f"| {name} | {_cell(row['prompt'])} | {' | '.join(cells)} | {counts} |")
    return "\n".join([*lines, "", f"In brackets: {result['interval']}."])


def _cell(prompt: str) -> str:
    """Markdown would take <subject> for HTML, and | for the end of the cell."""
    return prompt.replace("<", r"\<").replace("|", r"\|")
