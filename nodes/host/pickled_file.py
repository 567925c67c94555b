"""Files that are a dictionary of dictionaries of tensors: pickles, or .safetensors with their names joined by dots."""

from __future__ import annotations

from pathlib import Path

import comfy.utils
from torch import Tensor

from ...moa_core.files.file_error import FileError


def read_parts(path: Path, error: type[FileError], advice: str) -> dict[str, Tensor]:
    """The weights by `<part>.<name>`. Of pickles only those that hold nothing but tensors are read.

    Raises error, with what to do, for a file that is damaged, or a pickle that holds more: it could run code.
    """
    try:
        parts = comfy.utils.load_torch_file(str(path), safe_load=True)
        if path.suffix == ".safetensors":
            return parts
        weights = {}
        for part, named in parts.items():  # other kinds of file name their weights right here
            weights |= {part: named} if isinstance(named, Tensor) else {f"{part}.{n}": w for n, w in named.items()}
        if not all(isinstance(weight, Tensor) for weight in weights.values()):
            raise TypeError("not tensors alone")
        return weights
    except Exception as reason:  # whatever a damaged or a hostile pickle leads to
        problem = "is damaged, or a pickle of more than tensors, which could run code and is not read"
        raise error(path.name, problem, advice) from reason
