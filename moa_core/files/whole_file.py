"""Writing a file whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

UNFINISHED = "unfinished"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file or a folder under; it becomes `path` when the block ends without an error.

    What was there before stays until then. Each process has a name of its own, so that two never mix. Files get the
    rights that any new file has. Raises OSError where it cannot be written, whatever writes it.
    """
    unfinished = path.with_name(f"{UNFINISHED}-{os.getpid()}-{path.name}")
    try:
        yield unfinished
        _share(unfinished)
        if unfinished.is_dir():  # a folder cannot take the place of another
            shutil.rmtree(path, ignore_errors=True)
        unfinished.replace(path)
    except SafetensorError as error:  # of a full disk, for example
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True) if unfinished.is_dir() else unfinished.unlink(missing_ok=True)


def _share(written: Path) -> None:
    """Give files the rights of any new file: safetensors keeps its files from all but the account that wrote them."""
    probe = written.with_name(f"{written.name}.rights")
    probe.touch()
    rights = probe.stat().st_mode
    probe.unlink()
    for file in written.rglob("*") if written.is_dir() else [written]:
        if file.is_file():
            file.chmod(rights)


def write_whole(path: Path, content: bytes) -> None:
    """All of it or nothing, even when stopped halfway."""
    with whole(path) as unfinished:
        unfinished.write_bytes(content)


def is_unfinished(path: Path) -> bool:
    """Whether this is a file of `whole` that was never ended: its process was killed, or is still writing."""
    return re.match(rf"{UNFINISHED}-\d+-", path.name) is not None
