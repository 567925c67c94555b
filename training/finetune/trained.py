"""What a run has learnt, ready to sample: any method, also those that write no file for the nodes."""

from __future__ import annotations

from pathlib import Path

import torch

from training.config import Config
from training.finetune.checkpoint import load_checkpoint
from training.finetune.methods import METHODS
from training.finetune.model import build, trained
from training.host.pipeline import MoAPipeline


def trained_pipeline(config: Config, checkpoint: Path, device: torch.device | None = None) -> MoAPipeline:
    """The method of a configuration with the weights of its checkpoint, on a device (None: a GPU, if there is one).

    Raises BaseError or CheckpointError.
    """
    base, moa, model = build(config)
    load_checkpoint(checkpoint, trained(model))
    model.to(device or torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    base.to(model.empty.device)
    model.unet.call_type = METHODS[config.model.method].sampling_call
    return MoAPipeline(base, moa.eval(), model.unet)
