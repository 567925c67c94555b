"""Damaged .safetensors files, and what a user is told of them."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

LONGEST = 300
"""Characters that a dialog shows well."""


def refusal_by(read: Callable[[Path], object], error: type[Exception], path: Path) -> Callable[[bytes], str | None]:
    """What a file at path, of the bytes it is called with, is refused with; None if it is read.

    A refusal is always one sentence of the given error that names the file.
    """

    def read_bytes(content: bytes) -> str | None:
        path.write_bytes(content)
        try:
            read(path)
        except error as refused:
            sentence = str(refused)
            assert f"'{path.name}'" in sentence and len(sentence) <= LONGEST and len(sentence.splitlines()) == 1, (
                sentence
            )
            return sentence
        return None

    return read_bytes


def header_size(content: bytes) -> int:
    return 8 + struct.unpack("<Q", content[:8])[0]


def metadata_of(content: bytes) -> dict[str, str]:
    return json.loads(content[8 : header_size(content)])["__metadata__"]


def disk_full(weights, file: Path, metadata) -> None:
    """In place of save_file."""
    file.write_bytes(b"half")
    raise OSError("No space left on device")
