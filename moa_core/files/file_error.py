"""Why a file is refused, in one sentence for the user."""

from __future__ import annotations

from pathlib import Path

LONGEST_SENTENCE = 300
"""Characters of a refusal: it must be read in a dialog, whatever a damaged file holds."""
COMPARE = "compare with the page it came from and download it again"
"""What to do about an unreadable file."""


class FileError(ValueError):
    """A sentence for the user: the file, what was expected, what was found, what to do."""

    def __init__(self, file: str, problem: str, advice: str):
        """The sentence `'<file>' <problem>: <advice>`; of a problem that goes on and on the end is left out."""
        room = max(40, LONGEST_SENTENCE - len(f"'{file}' : {advice}"))
        super().__init__(f"'{file}' {short(problem, room)}: {advice}")


def unreadable(path: Path, error: Exception) -> str:
    """What is wrong with a file that safetensors cannot open."""
    return (
        f"cannot be read as a .safetensors file: it has {path.stat().st_size:,} bytes and is damaged, cut short or "
        f"of another kind ({short(str(error), 80)})"
    )


def short(text: str, room: int) -> str:
    """On one line of at most `room` characters."""
    line = " ".join(text.split())
    return line if len(line) <= room else line[: room - 1] + "…"
