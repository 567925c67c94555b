"""Runs of subjects that appear by image tokens, of FaceID files with their deltas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from diffusers import UNet2DConditionModel

from moa_core.adapters.deltas import deltas_of
from moa_core.adapters.image_expert import ImageMixture
from moa_core.adapters.ip_adapter_file import IPAdapter
from moa_core.adapters.run import Adapters
from moa_core.address import Address, BlockShape, block_shapes
from moa_core.run import Run
from moa_core.subjects.subject import Subject
from training.host.lora import face_lora


def image_run(
    mixture: ImageMixture,
    people: Sequence[Subject],
    blocks: Mapping[Address, BlockShape],
    strength: float = 1.0,
    pictures: int = 1,
) -> Run:
    adapters = Adapters(dict.fromkeys(people, mixture), {})
    return Run(people, pictures, (16, 16), 0.0, blocks, strength, adapters=adapters)


def photo_run(unet: UNet2DConditionModel, people: Mapping[Subject, IPAdapter]) -> Run:
    """Of one picture of 16 x 16 latents."""
    files = [adapter for adapter in dict.fromkeys(people.values()) if adapter.changes]
    parts = {subject: [files.index(adapter)] for subject, adapter in people.items() if adapter in files}
    deltas = deltas_of(unet, [face_lora(unet, file) for file in files]) if files else None
    adapters = Adapters({subject: adapter.mixture for subject, adapter in people.items()}, parts, deltas)
    return Run(list(people), 1, (16, 16), 0.0, block_shapes(unet.state_dict()), adapters=adapters)
