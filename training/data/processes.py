"""Work shared out over the processes of `accelerate launch`; without it there is one process, which does all."""

from __future__ import annotations

import atexit
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long the first process to finish waits for the last: shares are equal in number, not in work."""


def processes() -> PartialState:
    """Which of how many processes this one is, and its device: a GPU of its own, or the CPU."""
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    atexit.unregister(_leave)
    atexit.register(_leave)
    return state


def _leave() -> None:
    """Before the interpreter ends: a group that is still there then may take the process down with it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def share(things: Sequence[T]) -> Sequence[T]:
    """This process's part, of things that every process has in the same order; the parts differ by one at most."""
    state = processes()
    return things[state.process_index :: state.num_processes]


def gathered(own: list[T]) -> list[T]:
    """Every process's list, one after the other; waits until all have come here."""
    processes()
    return gather_object(own)


def share_of_missing(names: Sequence[str], is_there: Callable[[str], bool]) -> Sequence[str]:
    """This process's part of what is missing, whatever processes made the rest.

    Nobody begins before all have looked: otherwise one would take for done what another has just made.
    """
    return share(gathered([name for name in share(names) if not is_there(name)]))
