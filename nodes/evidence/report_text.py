"""A report as text for people, from what MoA Report found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def report_text(report: dict[str, Any]) -> str:
    """The text of what the JSON file holds."""
    return "\n".join(_lines(report))


def _lines(report: dict[str, Any]) -> Iterator[str]:
    pictures, settings = report["pictures"], report["settings"]
    versions = report["versions"]
    yield f"MoA Report (ComfyUI {versions['comfyui']}, MoA {versions['moa']}, torch {versions['torch']})"
    for picture in pictures:
        best = ", the best: its subjects are nearest to their own best" if picture["number"] == report["best"] else ""
        yield f"Picture {picture['number']} of {len(pictures)}{best if len(pictures) > 1 else ''}"
        for subject, found in zip(report["subjects"], picture["subjects"], strict=True):
            yield f"- subject{subject['number']}, '{subject['word']}' ({subject['kind']}): {_found(subject, found)}"
        yield f"- changed by MoA: {_change(picture['change_inside'])} on the subjects, " + (
            f"{_change(picture['change_outside'])} elsewhere"
        )
    yield (
        f"A step took {_seconds(report, 'with', 'not known: sample again')} with MoA, without it "
        f"{_seconds(report, 'without', 'not known: MoA was at work in all that were timed')}"
    )
    yield f"Device: {report['device']}"
    yield "Settings: " + ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
    for file in report["files"]:
        yield f"{file['kind']}: {file['name']}, sha256 {file['sha256']}"


def _found(subject: dict[str, Any], found: dict[str, Any]) -> str:
    if found["box"] is None:
        return "not found in the picture"
    left, top, right, bottom = (round(100 * edge) for edge in found["box"])
    place = f"{100 * found['share']:.1f}% of the picture, {left} to {right}% across and {top} to {bottom}% down"
    if subject["likeness_by"] is None:
        return f"{place}; likeness not measured: it was made of no photo"
    if found["likeness"] is None:
        return f"{place}; likeness not measured: no face is seen there"
    return f"{place}; likeness {found['likeness']:.3f} by {subject['likeness_by']}"


def _change(share: float | None) -> str:
    return "nothing to measure" if share is None else f"{100 * share:.2f}%"


def _seconds(report: dict[str, Any], which: str, unknown: str) -> str:
    seconds, steps = report["seconds_per_step"][which], report["timed_steps"][which]
    return unknown if seconds is None else f"{seconds:.3f} s (of {steps} timed)"
