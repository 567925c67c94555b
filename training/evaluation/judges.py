"""What an evaluation says of a picture, kept beside it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from moa_core.files.whole_file import write_whole
from training.evaluation.clip_score import ClipJudge
from training.evaluation.faces import FaceJudge, identity_preservation
from training.evaluation.fingerprint import fingerprint
from training.evaluation.references import ReferencePerson, read_picture
from training.evaluation.shots import Shot


@dataclass(frozen=True)
class Score:
    """One picture's figures; key: what they were taken of, and with."""

    key: str
    identity: float
    prompt_consistency: float
    face_missing: bool
    """Fewer faces were found than the picture has subjects."""


class Judges:
    """Scores pictures against the people's references."""

    def __init__(self, faces: FaceJudge, clip: ClipJudge, people: Iterable[ReferencePerson]):
        self.faces, self.clip = faces, clip
        self.references = {person.name: faces.reference(person.pictures) for person in people}  # [512] each
        self.fingerprint = fingerprint(faces.network, clip.network)

    def score(self, shot: Shot, path: Path) -> Score:
        """The score beside the picture where it is for this very picture, prompt, references and judges."""
        references = torch.stack([self.references[person.name] for person in shot.people])  # [S, 512]
        parts = [shot.prompt, self.fingerprint, *(person.fingerprint for person in shot.people)]
        key = hashlib.sha256(path.read_bytes() + json.dumps(parts).encode()).hexdigest()
        file = path.with_suffix(".json")
        if file.exists() and (known := json.loads(file.read_text(encoding="utf-8"))).get("key") == key:
            return Score(**known)
        picture = read_picture(path)
        faces = self.faces.faces(picture)
        consistency = self.clip.prompt_consistency(picture, shot.prompt)
        score = Score(key, identity_preservation(faces, references), consistency, len(faces) < len(references))
        write_whole(file, json.dumps(asdict(score)).encode())
        return score
