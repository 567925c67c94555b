"""Fingerprints: of an image encoder, which a subject file names instead of the encoder itself, and of a whole file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

SAMPLES = 1024
"""At least so many values of every weight count, or all of them: enough to tell any training apart, in milliseconds."""


def fingerprint(settings: dict[str, Any], *modules: nn.Module) -> str:
    """Of the weights of modules, and of settings (as JSON) that decide what they are shown.

    The same on every device, and for a file in float32 and its copy in float16.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for module in modules:
        for name, weight in sorted(module.named_parameters()):
            digest.update(f"{name} {list(weight.shape)}".encode())
            values = weight.detach().flatten()[:: max(1, weight.numel() // SAMPLES)]
            digest.update(values.to("cpu", torch.float16).numpy().tobytes())
    return digest.hexdigest()


PIECE = 2**20
"""Bytes of a file that are read at once."""


def file_hash(path: Path) -> str:
    """SHA-256 of a file, as the pages that files are downloaded from give it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
