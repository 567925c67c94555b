"""AdamW's groups, and the learning rate of a step."""

from __future__ import annotations

from torch import nn

from training.config import Optimizer


def learning_rate(optim: Optimizer, step: int) -> float:
    """The rate of a step, counted from 0."""
    rising, left = (step + 1) / max(optim.warmup, 1), (optim.steps - step) / max(optim.cooldown, 1)
    return optim.lr * min(1.0, rising, left)


def groups(parameters: dict[str, nn.Parameter], prompt_factor: float) -> list[dict]:
    """The optimizer's groups with their multiples of the learning rate: the subject prompt, and all others."""
    prompt = [parameter for name, parameter in parameters.items() if "subject_prompt" in name]
    others = [parameter for name, parameter in parameters.items() if "subject_prompt" not in name]
    return [{"params": others, "factor": 1.0}, {"params": prompt, "factor": prompt_factor}]
