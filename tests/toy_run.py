"""A finetune of a few steps on the untrained toy base; the fixture `toy` holds its files."""

import os
from pathlib import Path

from training.config import Config, Data, Loss, Model, Optimizer, Run

PACK = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(PACK)}


def config(toy: Path, out: Path, steps: int = 4, **others) -> Config:
    optimizer = {"lr": 1e-3, "batch": 2, "steps": steps}
    return Config(
        Model(str(toy / "base.safetensors"), str(toy / "encoder")),
        Data(str(toy / "data"), size=128, max_subjects=2, smallest_crop=0.9, workers=0),
        Run(str(out), precision="float32", validate_every=0, save_every=100),
        Loss(),
        Optimizer(**optimizer | others),
    )
