"""One training in a folder at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from training.finetune.checkpoint import CheckpointError


@contextmanager
def sole_run(folder: Path) -> Iterator[None]:
    """Hold the folder against other trainings; one that was killed holds it no longer. Raises CheckpointError."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "running.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise CheckpointError(
            f"another training is writing into {folder}: wait for it or stop it, or give another run.out"
        ) from None
    try:
        yield
    finally:
        lock.release()
