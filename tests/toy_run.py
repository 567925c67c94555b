"""Commands over several processes; a finetune of a few steps on the untrained toy base, whose files `toy` holds."""

import os
import subprocess
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from toy_world.shape import IMAGE_ENCODER, IMAGE_SIZE
from training.config import Config, Data, Loss, Model, Optimizer, Run
from training.data.preparation import Preparation

PACK = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(PACK)}
if "ATEN_CPU_CAPABILITY" in os.environ:  # an older processor is older for oneDNN, too: torch's bf16 attention asks both
    ENVIRONMENT |= {"ONEDNN_MAX_CPU_ISA": "AVX2"}


def start(module: str, *arguments: str | Path, processes: int = 1) -> subprocess.Popen:
    """A command, over several gloo processes as `accelerate launch` starts it."""
    several = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [sys.executable, "-m", *(several if processes > 1 else []), module, *map(str, arguments)]
    quiet = ENVIRONMENT | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(command, cwd=PACK, env=quiet, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> tuple[str, str]:
    """What a command printed and what it logged, when it has ended well."""
    printed, logged = process.communicate(timeout=600)
    assert process.returncode == 0, logged[-3000:]
    return printed, logged


def config(toy: Path, out: Path, steps: int = 4, **others) -> Config:
    optimizer = {"lr": 1e-3, "batch": 2, "steps": steps}
    return Config(
        Model(str(toy / "base.safetensors"), str(toy / "encoder")),
        Data(str(toy / "data"), max_subjects=2, smallest_crop=0.9, workers=0),
        Run(str(out), precision="float32", validate_every=0, save_every=100),
        Loss(),
        Optimizer(**optimizer | others),
    )


def curve(out: Path, name: str = "loss") -> list[tuple[int, float]]:
    """(step, value) of a figure, as TensorBoard draws it."""
    events = EventAccumulator(str(out / "tensorboard")).Reload().Scalars(name)
    return [(event.step, event.value) for event in events]


def preparation(**others) -> Preparation:
    """Of the toy world's pictures, for the toy MoA's image encoder."""
    shape = {"size": IMAGE_SIZE, "reference_size": IMAGE_ENCODER["image_size"]}
    return Preparation(**shape | others)
