"""What tells one model, or one picture, from another: a digest of the values alone, wherever they come from."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn


def fingerprint(*things: nn.Module | Tensor) -> str:
    """SHA-256 of modules' weights and of tensors, in order."""
    digest = hashlib.sha256()
    for thing in things:
        for tensor in thing.state_dict().values() if isinstance(thing, nn.Module) else [thing]:
            digest.update(tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
