"""AdamW, its groups, and the learning rate of a step."""

from __future__ import annotations

import torch
from torch import nn

from training.config import ConfigError, Optimizer


def optimizer_type(eight_bit: bool) -> type[torch.optim.Optimizer]:
    """torch's AdamW, or the one of bitsandbytes, whose moments take a quarter of the memory. Raises ConfigError."""
    if not eight_bit:
        return torch.optim.AdamW
    try:
        from bitsandbytes.optim import AdamW8bit  # here, as nothing else needs the package
    except ImportError as error:
        raise ConfigError(
            f"optimizer.eight_bit is true, and bitsandbytes cannot be imported ({error}): run `pip install "
            "bitsandbytes`, or set it to false"
        ) from error
    return AdamW8bit


def learning_rate(optim: Optimizer, step: int) -> float:
    """The rate of a step, counted from 0."""
    rising, left = (step + 1) / max(optim.warmup, 1), (optim.steps - step) / max(optim.cooldown, 1)
    return optim.lr * min(1.0, rising, left)


def groups(parameters: dict[str, nn.Parameter], prompt_factor: float) -> list[dict]:
    """The optimizer's groups with their multiples of the learning rate: the subject prompt, and all others."""
    prompt = [parameter for name, parameter in parameters.items() if "subject_prompt" in name]
    others = [parameter for name, parameter in parameters.items() if "subject_prompt" not in name]
    return [{"params": others, "factor": 1.0}, {"params": prompt, "factor": prompt_factor}]
