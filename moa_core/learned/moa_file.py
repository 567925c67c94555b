"""The MoA file: experts, routers, subject prompt and image encoder in one .safetensors file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files.file_error import COMPARE, FileError, short, unreadable
from ..files.whole_file import whole
from .moa import MoA, MoAConfig

FORMAT = "moa"
VERSIONS = ("1", "2")
"""2: of a MoA with experts in some layers alone. Other files are of version 1, as they always were."""

STORED_AS = (torch.float16, torch.bfloat16, torch.float32)


class MoAFileError(FileError):
    """Why a MoA file is refused."""


def save_moa(moa: MoA, path: str | os.PathLike, dtype: torch.dtype = torch.float16) -> None:
    """Write the file whole or not at all; weights are stored as dtype (float16, bfloat16 or float32)."""
    path = Path(path)
    version = VERSIONS[0] if moa.config.is_whole else VERSIONS[1]
    metadata = {"format": FORMAT, "format_version": version, "base": moa.config.base}
    metadata["config"] = json.dumps(moa.config.to_json())
    weights = {name: weight.detach().to("cpu", dtype).contiguous() for name, weight in moa.state_dict().items()}
    with whole(path) as unfinished:
        save_file(weights, unfinished, metadata)


def load_moa(
    path: str | os.PathLike,
    dtype: torch.dtype = torch.float32,
    encoder_dtype: torch.dtype | None = None,
) -> MoA:
    """Read a MoA file onto the CPU.

    dtype: of experts, routers and subject prompt; encoder_dtype: the image encoder's, the same if None. Raises
    MoAFileError for a file that is damaged or no MoA file.
    """
    path = Path(path)
    config, weights = _read(path)
    with torch.device("meta"):
        moa = MoA(config)
        _check(path, moa, weights)
    for name in weights:
        kind = (encoder_dtype or dtype) if name.startswith("image_encoder.") else dtype
        weights[name] = weights[name].to(kind, copy=True)  # what is not copied keeps the file mapped
    moa.load_state_dict(weights, assign=True)
    moa.image_encoder.fill_position_ids()
    return moa.eval().requires_grad_(False)


def _read(path: Path) -> tuple[MoAConfig, dict[str, Tensor]]:
    """Configuration and weights, or a sentence why not."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            config = _config(path, file.metadata() or {}, len(names))
            return config, {name: file.get_tensor(name) for name in names}
    except FileNotFoundError:
        raise MoAFileError(str(path), "does not exist", "put the MoA file into ComfyUI's models/moa folder") from None
    except (SafetensorError, OSError) as error:
        raise MoAFileError(path.name, unreadable(path, error), COMPARE) from error


def _config(path: Path, metadata: dict[str, str], tensors: int) -> MoAConfig:
    """tensors: how many the file holds; no MoA of as many layers or more can come from it."""
    if metadata.get("format") != FORMAT:
        raise MoAFileError(
            path.name,
            f"is no MoA file: expected the format '{FORMAT}' in its metadata, found '{metadata.get('format', 'none')}'",
            "pick a moa-*.safetensors file",
        )
    if metadata.get("format_version") not in VERSIONS:
        raise MoAFileError(
            path.name,
            f"has MoA format version '{metadata.get('format_version', 'none')}', and this version of the pack reads "
            f"versions {' and '.join(map(repr, VERSIONS))}",
            "Update the pack, or use an older file",
        )
    try:
        config = MoAConfig.from_json(json.loads(metadata["config"]))
        layers = config.image_encoder.get("num_hidden_layers", 0)
        if layers > tensors:  # before anyone tries to build them
            raise ValueError(f"num_hidden_layers is {layers}, but the file holds {tensors} tensors")
        with torch.device("meta"):
            MoA(config)
        return config
    except Exception as error:  # whatever torch and transformers raise for sizes that make no sense
        raise MoAFileError(
            path.name,
            f"has a damaged configuration in its metadata ({type(error).__name__}: {short(str(error), 120)})",
            "download the file again",
        ) from error


def _check(path: Path, moa: MoA, weights: dict[str, Tensor]) -> None:
    """Every weight is there, none is left over, all have the shapes that the configuration says, and are numbers."""
    expected = moa.state_dict()
    wrong = [f"{name} is missing" for name in expected.keys() - weights.keys()]
    wrong += [f"{short(name, 80)} is unknown" for name in weights.keys() - expected.keys()]
    for name in expected.keys() & weights.keys():
        if weights[name].shape != expected[name].shape:
            found, wanted = list(weights[name].shape), list(expected[name].shape)
            wrong.append(f"{name} has shape {found}, expected {wanted}")
        if weights[name].dtype not in STORED_AS:
            wrong.append(f"{name} is stored as {weights[name].dtype}, expected a float of 16 or 32 bits")
        elif not weights[name].isfinite().all():
            wrong.append(f"{name} holds what is no number (NaN or infinite): its training has failed")
    if wrong:
        others = f" (and {len(wrong) - 1} more such)" if len(wrong) > 1 else ""
        raise MoAFileError(
            path.name,
            f"does not hold the weights its configuration names: {short(min(wrong), 150)}{others}",
            "download the file again",
        )
