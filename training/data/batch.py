"""What one pass of the finetune sees: records in the data set's order, and each record's own randomness.

The n-th record of a run is the same, with the same noise, whatever the number of processes, of workers and
of interruptions: all of it follows from (seed, n).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from training.config import Loss
from training.data.readers import share
from training.host.tokenizer import token_before, tokenize


class EndlessSampler(Sampler):
    """Keys (epoch, index) of the records first, first + 1, ... for one of `processes` that share every pass.

    Each epoch is a permutation of its own. A pass of `batch` records goes to every process in turn.
    """

    def __init__(self, records: int, batch: int, seed: int, first: int = 0, process: int = 0, processes: int = 1):
        self.records, self.batch, self.seed = records, batch, seed
        self.first, self.process, self.processes = first, process, processes

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, np.empty(0, int)
        start = self.first + self.process * self.batch
        while True:
            keys = []
            for number in range(start, start + self.batch):
                if number // self.records != epoch:
                    epoch = number // self.records
                    order = np.random.default_rng([self.seed, epoch]).permutation(self.records)
                keys.append((epoch, int(order[number % self.records])))
            yield keys
            start += self.batch * self.processes


@dataclass
class Batch:
    """B records with S places for subjects; h and w are the latent's, R the side of a reference."""

    captions: list[str]
    pictures: Tensor
    """[B, 3, H, W] in -1..1."""
    references: Tensor
    """[B, S, 3, R, R], prepared for the image encoder."""
    masks: Tensor
    """[B, S, H, W], 1 where the subject is visible; 0 for one that is bound to nothing."""
    ids: Tensor
    """[B, 77]: tokens of the caption."""
    positions: Tensor
    """[B, S]: the token that each subject is bound to; -1 where there is none."""
    moments: Tensor | None = None
    """[B, 2, 4, h, w]: mean and standard deviation of the pictures' latents, where they are cached."""

    def to(self, device: torch.device) -> Batch:
        """On the device, and in float32."""
        values = (getattr(self, f.name) for f in fields(self))
        moved = Batch(*(v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for v in values))
        if moved.pictures.dtype == torch.uint8:
            moved.pictures = moved.pictures.float() / 255 * 2 - 1
        moved.references, moved.masks = moved.references.float(), moved.masks.float()
        return moved


def collate(items: list[dict]) -> Batch:
    """Items of a SubjectDataset -> a batch, small until it is on its device: it comes through shared memory.

    Pictures are bytes, and left out where their latents are cached; masks are bits of a byte, references of half
    precision, and there are no more places than the batch has subjects. A subject whose word has no token (it is beyond
    the 77, or the phrase ends within one) is bound to nothing: it leaves the masks, so that no loss asks for a person
    whom the model is not shown.
    """
    captions = [item["caption"] for item in items]
    most = max(1, *(int(item["valid"].sum()) for item in items))  # the first places are taken first
    positions = torch.tensor([bound_positions(item)[:most] for item in items])
    cached = "moments" in items[0]
    pictures = torch.stack([((item["picture"] + 1) * 127.5).round().to(torch.uint8) for item in items])
    masks = torch.stack([item["masks"][:most].bool() for item in items])
    batch = Batch(
        captions,
        pictures[..., :0].clone() if cached else pictures,
        torch.stack([item["references"][:most].half() for item in items]),
        masks & (positions >= 0)[:, :, None, None],
        torch.tensor([tokenize(caption) for caption in captions]),
        positions,
        torch.stack([item["moments"] for item in items]) if cached else None,
    )
    share(*(value for value in vars(batch).values() if isinstance(value, Tensor)))
    return batch


def bound_positions(item: dict) -> list[int]:
    """The token that each subject of a SubjectDataset's item is bound to; -1 where there is none."""
    ends = zip(item["positions"].tolist(), item["valid"].tolist(), strict=True)
    return [token_before(item["caption"], end) if valid else -1 for end, valid in ends]


@dataclass
class Chance:
    """The randomness of B records."""

    timestep: Tensor
    """[B], each below the config's `timesteps`."""
    noise: Tensor
    """[B, 4, h, w]: what is to be predicted."""
    encoding: Tensor
    """[B, 4, h, w]: the autoencoder's own noise."""
    dropped: Tensor
    """[B] bool: whose caption is emptied."""
    masked: Tensor
    """[B] bool: whose error counts on the subjects alone."""

    @classmethod
    def of(cls, seed: int, first: int, count: int, size: tuple[int, int], loss: Loss) -> Chance:
        """That of the records first to first + count - 1; size: (h, w)."""
        rows = []
        for number in range(first, first + count):
            state = np.random.SeedSequence([seed, number]).generate_state(1)[0]
            random = torch.Generator().manual_seed(int(state))
            rows.append(
                (
                    torch.randint(loss.timesteps, (), generator=random),
                    torch.randn(4, *size, generator=random),
                    torch.randn(4, *size, generator=random),
                    torch.rand((), generator=random) < loss.dropped,
                    torch.rand((), generator=random) < loss.masked,
                )
            )
        return cls(*(torch.stack(column) for column in zip(*rows, strict=True)))

    def to(self, device: torch.device) -> Chance:
        return Chance(*(getattr(self, f.name).to(device) for f in fields(self)))


def empty_ids() -> Tensor:
    """[77]: the empty caption."""
    return torch.tensor(tokenize(""))
