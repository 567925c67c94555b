"""Records as WebDataset tar shards, for data that no single machine holds: written once, then streamed."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import webdataset
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from tqdm import tqdm
from webdataset.tariterators import group_by_keys, tar_file_expander

from moa_core.files.whole_file import whole
from training.config import ConfigError
from training.data.dataset import BrokenRecords, TooManyBroken
from training.data.layout import place, read_names
from training.data.preparation import Preparation
from training.data.records import LATENTS, BrokenRecord, Record, read_record

ENDINGS = ("jpg", "json", "npy")
TAR_END = bytes(2 * tarfile.BLOCKSIZE)
SHUFFLED = 1000
"""Records that wait in a worker's memory to be picked in random order."""


def write_shards(data: Path, out: Path, records: int = 1000) -> int:
    """Pack both splits into out/train-000000.tar, ...; every shard whole or not at all. Returns their number."""
    out.mkdir(parents=True, exist_ok=True)
    count = 0
    for split in ("train", "test"):
        names = read_names(data, split)
        for number, start in enumerate(tqdm(range(0, len(names), records), desc=split, unit="shard")):
            shard = out / f"{split}-{number:06d}.tar"
            # Opened here: webdataset would take a drive's letter for the scheme of a URL.
            with whole(shard) as unfinished, unfinished.open("wb") as file, webdataset.TarWriter(file) as tar:
                for name in names[start : start + records]:
                    tar.write({"__key__": _key(name)} | _files(data, name))
            count += 1
    return count


def _files(root: Path, name: str) -> dict[str, bytes]:
    """A record's files by their endings, its cached latents among them where there are any."""
    endings = [*ENDINGS, LATENTS] if place(root, name, LATENTS).exists() else ENDINGS
    return {ending: place(root, name, ending).read_bytes() for ending in endings}


def _key(name: str) -> str:
    """A record's name within a shard, where what comes after a dot is a file's ending."""
    return name.replace("%", "%25").replace(".", "%2E")


def find_shards(root: Path, split: str) -> list[Path]:
    """The shards of a split; none where the folder holds records of their own."""
    return sorted(root.glob(f"{split}-*.tar"))


class ShardDataset(IterableDataset):
    """An endless stream of items (Preparation) from a split's shards.

    Every epoch has its own order of shards, which processes and their workers share out among themselves; the
    records of a shard are shuffled. Broken records are left out, as SubjectDataset does.
    """

    def __init__(
        self, root: Path, preparation: Preparation, split: str, seed: int = 0, process: int = 0, processes: int = 1
    ):
        self.root, self.preparation, self.seed = root, preparation, seed
        self.process, self.processes = process, processes
        self.shards = find_shards(root, split)
        self.broken = BrokenRecords(root)

    def __iter__(self) -> Iterator[dict[str, Tensor | str]]:
        worker = get_worker_info()
        readers = self.processes * (worker.num_workers if worker else 1)
        reader = self.process * (worker.num_workers if worker else 1) + (worker.id if worker else 0)
        if readers > len(self.shards):
            raise ConfigError(
                f"{self.root} holds {len(self.shards)} shards for {readers} readers (processes x data.workers), and "
                "each needs one: pack it with fewer records per shard, or set data.workers lower"
            )
        epoch = 0
        while True:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.shards))
            own = [self.shards[n] for n in order[reader::readers]]
            records = 0
            for records, item in enumerate(self._read(own, epoch, reader), start=1):  # noqa: B007
                yield item
            if not records:
                raise TooManyBroken(f"no whole record in {', '.join(map(str, own))}: they are damaged, pack them again")
            epoch += 1

    def _read(self, shards: list[Path], epoch: int, reader: int) -> Iterator[dict[str, Tensor | str]]:
        rng = np.random.default_rng([self.seed, epoch, reader])
        files = tar_file_expander(self._opened(shards), handler=self._broken_shard)
        stream = group_by_keys(files)
        for sample in webdataset.shuffle(SHUFFLED, seed=int(rng.integers(2**31)))(stream):
            self.broken.reads += 1
            try:
                yield self.preparation(_record(sample, self.preparation.latents), rng)
            except BrokenRecord as error:
                self.broken.note(sample["__key__"], error)

    def _opened(self, shards: list[Path]) -> Iterator[dict]:
        for shard in shards:
            self.shard = shard
            try:
                with shard.open("rb") as stream:
                    if not _ends(stream):
                        self._broken_shard(OSError("its end is missing"))
                    yield {"url": str(shard), "stream": stream}
            except OSError as error:
                self._broken_shard(error)

    def _broken_shard(self, error: Exception) -> bool:
        """Note that the shard being read ends too soon, or is no shard; what was read of it counts."""
        if isinstance(error, TooManyBroken):
            raise error
        self.broken.reads += 1
        found = f"{type(error).__name__}: {error.args[0]}"
        self.broken.note(self.shard.name, BrokenRecord(self.shard, "a whole shard", found))
        return True


def _ends(shard: BinaryIO) -> bool:
    """Whether a tar file has its end, two blocks of zeros: one that is cut within a header is read without an error."""
    size = shard.seek(0, io.SEEK_END)
    shard.seek(max(0, size - len(TAR_END)))
    last = shard.read()
    shard.seek(0)
    return last == TAR_END


def _record(sample: dict, latents: int | None) -> Record:
    """A sample of a shard, read and checked as a record of a folder is."""

    def open(path: Path) -> BinaryIO:
        ending = path.name.partition(".")[2]
        if ending not in sample:
            raise FileNotFoundError
        return io.BytesIO(sample[ending])

    return read_record(Path(sample["__url__"]), sample["__key__"], open=open, latents=latents)
