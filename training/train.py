"""python -m training.train --config FILE: the finetune of a MoA. Runs under `accelerate launch` unchanged."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from training.config import ConfigError, read_config
from training.data.dataset import TooManyBroken
from training.data.layout import EmptySplit
from training.data.readers import ReaderError
from training.finetune.checkpoint import CheckpointError, find_checkpoint
from training.finetune.loop import TrainingFailed, train
from training.host.base import BaseError

REFUSALS = (ConfigError, BaseError, CheckpointError, EmptySplit, TooManyBroken, ReaderError, TrainingFailed)
"""Sentences for the user."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.train", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--config", type=Path, required=True, help="a YAML file: training/configs/toy.yaml, ffhq.yaml")
    parser.add_argument("--resume", help="'latest', or the folder of a checkpoint")
    args = parser.parse_args(argv)
    try:
        config = read_config(args.config)
        train(config, find_checkpoint(Path(config.run.out) / "checkpoints", args.resume))
    except (*REFUSALS, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
