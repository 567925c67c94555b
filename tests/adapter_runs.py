"""Runs of subjects that appear by image tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from moa_core.adapters.image_expert import ImageMixture
from moa_core.adapters.run import Adapters
from moa_core.address import Address, BlockShape
from moa_core.run import Run
from moa_core.subjects.subject import Subject


def image_run(
    mixture: ImageMixture,
    people: Sequence[Subject],
    blocks: Mapping[Address, BlockShape],
    strength: float = 1.0,
    pictures: int = 1,
) -> Run:
    adapters = Adapters(dict.fromkeys(people, mixture), {})
    return Run(people, pictures, (16, 16), 0.0, blocks, strength, adapters=adapters)
