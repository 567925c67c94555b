"""What a sampling run notes of itself, for MoA Report: its settings, and how long its steps took."""

from __future__ import annotations

import time
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from torch import Tensor


@dataclass(eq=False)
class RunNotes:
    """Of one sampling run."""

    settings: dict[str, Any]
    _seconds: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})

    def after_each_step(self, callback: Callable | None, steps_of_moa: Container[int]) -> Callable:
        """A sampler's callback that notes the time and goes on to the host's own.

        steps_of_moa: the numbers of the steps in which MoA is at work. The first step is not counted: a part of it is
        spent on what happens once.
        """
        last: float | None = None

        def note(step: int, *args: Any, **kwargs: Any) -> Any:
            nonlocal last
            now = time.perf_counter()
            if last is not None:
                self._seconds[step in steps_of_moa].append(now - last)
            out = None if callback is None else callback(step, *args, **kwargs)
            last = time.perf_counter()
            return out

        return note

    def seconds(self, with_moa: bool) -> float | None:
        """The median time of a step with or without MoA at work in it; None where no such step was timed."""
        timed = self._seconds[with_moa]
        return median(timed) if timed else None

    def steps(self, with_moa: bool) -> int:
        """How many steps that median is of."""
        return len(self._seconds[with_moa])


def settings_of(guider, sampler, sigmas: Tensor) -> dict[str, Any]:
    """What the host samples with, as far as it says so: sampler, steps and cfg."""
    function = getattr(sampler, "sampler_function", None)
    name = getattr(function, "__name__", type(sampler).__name__).removeprefix("sample_")
    cfg = getattr(guider, "cfg", None)
    return {"sampler": name, "steps": len(sigmas) - 1, "cfg": None if cfg is None else float(cfg)}
