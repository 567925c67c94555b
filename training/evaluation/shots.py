"""The pictures of an evaluation: which people, which prompt, which noise."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moa_core.subjects.binding import Binding
from moa_core.subjects.subject import Subject
from training.evaluation.references import ReferencePerson
from training.host.tokenizer import token_before

PLACEHOLDER = "<subject>"
GLUED = re.compile(rf"[\w>]{PLACEHOLDER}|{PLACEHOLDER}\w")


@dataclass(frozen=True)
class Shot:
    """The n-th picture of a prompt (the `number`-th line, with placeholders) with people for its placeholders."""

    people: tuple[ReferencePerson, ...]
    number: int
    template: str
    n: int

    @property
    def name(self) -> str:
        """Its files in the output folder, without their ending."""
        return f"{'+'.join(person.name for person in self.people)}/{self.number}-{self.n}"

    @property
    def prompt(self) -> str:
        return _fill(self.template, self.people)[0]

    def bindings(self, subjects: Sequence[Subject]) -> list[Binding]:
        """Each subject at its placeholder's word, whatever else the prompt says. Raises ValueError."""
        prompt, ends = _fill(self.template, self.people)
        positions = [token_before(prompt, end) for end in ends]
        if -1 in positions:
            raise ValueError(
                f"prompt {self.number} ('{self.template}') has a {PLACEHOLDER} beyond CLIP's 77 tokens: shorten it"
            )
        return [Binding(position, subject) for position, subject in zip(positions, subjects, strict=True)]

    def seed(self, seed: int) -> int:
        """The noise's seed: the same whatever else is drawn, before or after."""
        parts = json.dumps([seed, [person.name for person in self.people], self.template, self.n])
        return int.from_bytes(hashlib.sha256(parts.encode()).digest()[:7], "big")


def _fill(template: str, people: Sequence[ReferencePerson]) -> tuple[str, list[int]]:
    """The prompt with a word for each placeholder, and where these words end."""
    prompt, *pieces = template.split(PLACEHOLDER)
    ends = []
    for person, piece in zip(people, pieces, strict=True):
        ends.append(len(prompt) + len(person.word))
        prompt += person.word + piece
    return prompt, ends


def read_prompts(path: Path) -> list[str]:
    """One prompt a line, empty lines left out. Raises ValueError for a prompt without a place for a subject."""
    prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts: {path} holds no prompt; expected one a line: 'a {PLACEHOLDER} on a beach'")
    for prompt in prompts:
        if PLACEHOLDER not in prompt or GLUED.search(prompt):
            raise ValueError(
                f"--prompts: {path}: '{prompt}' needs {PLACEHOLDER}, as a word by itself, where the subject's word goes"
            )
    return prompts


def plan(people: Sequence[ReferencePerson], prompts: Sequence[str], images: int) -> Iterator[Shot]:
    """Every prompt with every person; one of two placeholders with every pair of people, 105 of 15."""
    for number, template in enumerate(prompts):
        count = template.count(PLACEHOLDER)
        if count > len(people):
            raise ValueError(f"prompt '{template}' is for {count} people: --subjects holds only {len(people)}")
        for shown in itertools.combinations(people, count):
            yield from (Shot(shown, number, template, n) for n in range(images))
