"""Checkpoints: all of a run that cannot be computed again, as safetensors and JSON, whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from moa_core.files.whole_file import UNFINISHED, whole

PARAMETERS, MOMENTS, STATE = "parameters.safetensors", "optimizer.safetensors", "state.json"
TABLES = ("qmap1", "qmap2")
"""Of AdamW8bit: one tensor for all parameters each, and safetensors stores no tensor under two names."""


class CheckpointError(ValueError):
    """A sentence for the user: the folder, what was expected, what was found."""


def save_checkpoint(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write folder/step-00001000 under another name first, then drop the oldest but `keep`.

    state: JSON with the `step`, the `records` seen and the `config`; the optimizer's name is added. Raises
    CheckpointError where it cannot be written; those that are there stay.
    """
    target = folder / f"step-{state['step']:08d}"
    for leftover in folder.glob(f"{UNFINISHED}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    moments = {
        f"{key}.{name}": value.clone() if key in TABLES else torch.as_tensor(value)
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }
    state = state | {"optimizer": type(optimizer).__name__}
    try:
        with whole(target) as unfinished:
            unfinished.mkdir(parents=True)
            _save(dict(parameters), unfinished / PARAMETERS)
            _save(moments, unfinished / MOMENTS)
            (unfinished / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    except OSError as error:
        kept = checkpoints(folder)
        last = f"the last whole checkpoint is {kept[-1]}" if kept else "there is no other"
        how = "go on with --resume latest" if kept else "start again"
        raise CheckpointError(
            f"{target} could not be written ({error.__cause__ or error}); {last}. Make room on the disk and {how}"
        ) from error
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def checkpoints(folder: Path) -> list[Path]:
    """All whole checkpoints in the folder, the oldest first."""
    return sorted(folder.glob("step-*"))


def load_checkpoint(
    path: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Give parameters, and the optimizer if any, what the checkpoint holds; returns its state.

    Raises CheckpointError.
    """
    try:
        # Read, not mapped: a mapped file cannot be replaced or removed on Windows.
        values = load((path / PARAMETERS).read_bytes())
        moments = load((path / MOMENTS).read_bytes()) if optimizer else {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is no whole checkpoint ({type(error).__name__}: {error})") from error
    state = read_state(path)
    if optimizer:
        _check_optimizer(path, state.get("optimizer", torch.optim.AdamW.__name__), type(optimizer).__name__)
    shapes = {name: list(p.shape) for name, p in parameters.items()}
    found = {name: list(v.shape) for name, v in values.items()}
    if shapes != found:
        other = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
        raise CheckpointError(
            f"{path} was made with another configuration: {len(other)} parameters differ, such as {other[0]} "
            f"(expected {shapes.get(other[0], 'none')}, found {found.get(other[0], 'none')}). Resume with its own"
        )
    for name, parameter in parameters.items():
        parameter.data.copy_(values[name])
    for label, value in moments.items():
        key, name = label.split(".", 1)
        optimizer.state[parameters[name]][key] = _as_kept(key, value, parameters[name].device)
    return state


def _as_kept(key: str, value: Tensor, device: torch.device) -> Tensor | int:
    """As an optimizer keeps it: moments beside their parameter, AdamW's count on the CPU, AdamW8bit's as a number."""
    if key != "step":
        return value.to(device)
    return value if value.is_floating_point() else int(value)


def _check_optimizer(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise CheckpointError(
            f"{path} holds the moments of {found}, which {expected} cannot read: set optimizer.eight_bit to "
            f"{'false' if found == torch.optim.AdamW.__name__ else 'true'}, as it was. Or start another run, with "
            "another run.out, from the weights alone: model.start takes the MoA file of this one"
        )


def read_state(path: Path) -> dict[str, Any]:
    """The `step`, the `records` seen and the `config` of a checkpoint. Raises CheckpointError."""
    try:
        return json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no whole checkpoint ({type(error).__name__}: {error})") from error


def find_checkpoint(folder: Path, resume: str | None) -> Path | None:
    """What to go on from. Raises CheckpointError rather than start anew where a run is already."""
    there = checkpoints(folder)
    if resume is None:
        if there:
            raise CheckpointError(
                f"{folder} holds checkpoints already: go on with --resume latest, or give another run.out"
            )
        return None
    if resume == "latest" and not there:
        raise CheckpointError(f"{folder} holds no whole checkpoint to resume from; start without --resume")
    if resume == "latest":
        return there[-1]
    if later := [path.name for path in there if path.name > Path(resume).name]:
        raise CheckpointError(
            f"{folder} holds checkpoints later than {resume}: {', '.join(later)}. A run that goes on from there writes "
            "beside them, and they would be taken for its newest: remove them or put them elsewhere first"
        )
    return Path(resume)
