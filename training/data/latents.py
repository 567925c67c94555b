"""Cached latents: those of a data set's pictures, computed once instead of in every step.

Beside each record's other files: <id>.latents.safetensors, the mean and standard deviation, float16
[4, size / 8, size / 8], that the autoencoder gives the largest square in the picture's middle. Training reads them
with `data.cached_latents: true`. Records that have theirs already are kept, so a stopped run goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tarfile
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from moa_core.files.whole_file import write_whole
from training.config import ConfigError
from training.data.batch import Batch, Chance
from training.data.dataset import BrokenRecords
from training.data.layout import place, read_names
from training.data.preparation import as_tensor, cut, middle
from training.data.processes import gathered, processes, share_of_missing
from training.data.readers import read
from training.data.records import LATENTS, BrokenRecord, read_image
from training.data.shards import find_shards

DECODER = ("decoder.", "post_quant_conv.")
"""Parts of an autoencoder that its latents do not depend on."""


class Squares(Dataset):
    """(name, square) of these records, as Preparation crops without `augment`; None for a broken one.

    A picture and no tensor: it comes from its reader through a pipe, and needs no shared memory. Raises TooManyBroken.
    """

    def __init__(self, root: Path, names: list[str], size: int):
        self.root, self.names, self.size = root, names, size
        self.broken = BrokenRecords(root, len(names))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[str, Image.Image | None]:
        name = self.names[index]
        self.broken.reads += 1
        try:
            image = read_image(place(self.root, name, "jpg"))
        except BrokenRecord as error:
            self.broken.note(name, error)
            return name, None
        return name, cut(image, middle(image.size), self.size)


@torch.no_grad()
def write_latents(root: Path, autoencoder: nn.Module, size: int, batch: int = 8, workers: int = 0) -> int:
    """Write what both splits of a data set still lack, for pictures of this size; returns how many were written.

    Processes share the work, and all return the sum. autoencoder: as in Base, on the device that is to do the work.
    Raises FileNotFoundError, EmptySplit, TooManyBroken.
    """
    tag, device = tag_of(autoencoder, size), next(autoencoder.parameters()).device
    names = read_names(root, "all")
    own = share_of_missing(names, lambda name: read_tag(place(root, name, LATENTS)) == tag)
    written = 0
    loader = DataLoader(Squares(root, own, size), batch, num_workers=workers, collate_fn=list)
    with tqdm(total=len(own), desc="latents", unit="picture", disable=not processes().is_main_process) as bar:
        for loaded in read(loader):
            whole = [(name, picture) for name, picture in loaded if picture is not None]
            if whole:
                pictures = torch.stack([as_tensor(picture) for _, picture in whole]).to(device)
                moments = torch.stack(autoencoder.moments(pictures), dim=1)  # [B, 2, 4, h, w]
                moments = moments.half().cpu().contiguous().numpy()  # safetensors stores memory as it lies
                for (name, _), (mean, std) in zip(whole, moments, strict=True):
                    write_whole(place(root, name, LATENTS), save({"mean": mean, "std": std}, tag))
            written += len(whole)
            bar.update(len(loaded))
    return sum(gathered([written]))


def tag_of(autoencoder: nn.Module, size: int) -> dict[str, str]:
    """What a file of latents says of itself: which autoencoder made them, of pictures of which size."""
    digest = hashlib.sha256()
    for name, weight in autoencoder.state_dict().items():
        if not name.removeprefix("vae.").startswith(DECODER):
            digest.update(name.encode())
            digest.update(weight.half().cpu().numpy().tobytes())  # the same for weights stored in either precision
    return {"autoencoder": digest.hexdigest()[:16], "size": str(size)}


def read_tag(path: Path) -> dict[str, str]:
    """What a file of latents says of itself; nothing where it is missing or damaged."""
    return _tag(path.read_bytes()) if path.exists() else {}


def _tag(content: bytes) -> dict[str, str]:
    """The metadata of a .safetensors file: the header's length in 8 bytes, then the header as JSON."""
    try:
        load(content)
    except SafetensorError:
        return {}
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})


def check_latents(root: Path, autoencoder: nn.Module, size: int) -> None:
    """Raises ConfigError unless the first latents of the training split were made by this autoencoder at this size."""
    command = f"python -m training.latents --data {root} --base (your model.base) --size {size}"
    file, found = _first(root)
    expected = tag_of(autoencoder, size)
    if file is None:
        raise ConfigError(
            f"data.cached_latents: {root} holds no latents (*.{LATENTS}): make them with {command}; shards "
            "are to be packed again after that (python -m training.shards). Or set data.cached_latents: false"
        )
    if found != expected:
        raise ConfigError(
            f"data.cached_latents: {file} was made with other settings: expected {expected}, found {found}. Make the "
            f"latents again with {command}; shards are to be packed again after that (python -m training.shards)"
        )


def _first(root: Path) -> tuple[str | None, dict[str, str]]:
    """The first latents of the training split, in a folder or in shards, and what they say of themselves."""
    shards = find_shards(root, "train")
    if not shards:
        paths = (place(root, name, LATENTS) for name in read_names(root, "train"))
        path = next((path for path in paths if path.exists()), None)
        return (str(path), read_tag(path)) if path else (None, {})
    for shard in shards:
        with contextlib.suppress(tarfile.ReadError), tarfile.open(shard) as tar:  # of a damaged one the training tells
            for member in tar:
                if member.name.endswith(LATENTS):
                    return f"{shard}/{member.name}", _tag(tar.extractfile(member).read())
            return None, {}
    return None, {}


def latents_of(batch: Batch, chance: Chance, autoencoder: nn.Module) -> Tensor:
    """[B, 4, h, w] from the cached moments where the batch has them, otherwise from its pictures."""
    if batch.moments is None:
        return autoencoder.encode(batch.pictures, chance.encoding)
    mean, std = batch.moments.unbind(dim=1)
    return mean + std * chance.encoding
