"""FastComposer's subjects and prompts, as it published them: evaluation/single_object/data.py of its repository.

The file is read, never run; nothing of it comes with this package.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

SUBJECTS = "IMAGE_TO_GENDER_EVAL"
"""The dictionary of the subjects that are evaluated: folder -> word."""
PROMPTS = re.compile(r"get_\w+_prompts")
"""The functions that list the prompts."""
PLACE = re.compile(r"\{[^{}]*\} \{[^{}]*\}")
"""Word and picture token side by side, in either order."""


@dataclass(frozen=True)
class PublishedLists:
    words: dict[str, str]
    """What each subject's folder stands for: man, woman."""
    prompts: list[str]
    """With <subject> where word and picture token stand."""


def read_published(path: Path, placeholder: str) -> PublishedLists:
    """Raises ValueError for a file that does not hold the lists."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        words = next(
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == SUBJECTS
        )
        functions = [n for n in tree.body if isinstance(n, ast.FunctionDef) and PROMPTS.fullmatch(n.name)]
        lists = [node for function in functions for node in ast.walk(function) if isinstance(node, ast.List)]
        templates = [_text(element) for one in lists for element in one.elts]
    except (StopIteration, SyntaxError, UnicodeDecodeError, ValueError, AttributeError) as error:
        raise ValueError(_refusal(path, f"{type(error).__name__} {error}".strip())) from error
    prompts = [PLACE.sub(placeholder, template) for template in templates]
    if not words or not prompts or any(prompt.count(placeholder) != 1 or "{" in prompt for prompt in prompts):
        raise ValueError(_refusal(path, f"{len(words)} subjects and {len(prompts)} prompts, not all with one subject"))
    return PublishedLists(words, prompts)


def _text(node: ast.expr) -> str:
    """An f-string, or a text with .format(...), with every value as {...}."""
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "{value}" for part in node.values)
    return node.func.value.value  # "...".format(...)


def _refusal(path: Path, found: str) -> str:
    return (
        f"--prompts: {path}: expected FastComposer's evaluation/single_object/data.py, with its {SUBJECTS} and "
        f"get_..._prompts, found {found}. Give that file, or a text file with a prompt a line"
    )
