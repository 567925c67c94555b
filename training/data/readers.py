"""The processes that read for a training: how they end, what they say, and the memory that batches come through."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

LOST = "DataLoader worker"
"""How torch begins to say that a reader's process died."""
NARROW = (
    "the readers' batches did not fit into shared memory: start Docker with more of it, such as --shm-size 4g, or set "
    "optimizer.batch or data.workers lower (with data.workers 0 the training reads by itself and needs none)"
)


class ReaderError(RuntimeError):
    """A sentence for the user."""


def read(loader: DataLoader) -> Iterator[Any]:
    """What the loader gives. An error of a reader is raised as if it had been met here, and ends all readers.

    torch puts a reader's traceback into the message of its error, and what it raises holds on to the readers: those
    that ignore signals would keep the interpreter from ending.
    """
    try:
        yield from loader
        return
    except Exception as error:
        failure = _plain(error)
        error.__traceback__ = None
    raise failure


def _plain(error: Exception) -> Exception:
    """Without the traceback that torch wrote into its message."""
    text = str(error)
    if text.startswith(LOST):
        return ReaderError(f"{text.strip().splitlines()[0]} It may have run out of memory, or {NARROW}")
    parts = re.split(rf"^(?:\w+\.)*{type(error).__name__}: ", text, flags=re.MULTILINE)
    return type(error)(parts[-1].strip()) if "Original Traceback" in text and len(parts) > 1 else error


def share(*tensors: Tensor) -> None:
    """Move what a reader hands over into shared memory while it can still say that there is none left.

    torch would do it in a thread whose errors reach nobody, and the training would wait for ever. Raises ReaderError.
    """
    if get_worker_info() is None:
        return
    try:
        for tensor in tensors:
            tensor.share_memory_()
    except RuntimeError as error:
        raise ReaderError(NARROW) from error
