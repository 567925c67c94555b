"""The trace: which maps it keeps, and the subject area it makes of them."""

import pytest
import torch

from moa_core.address import Address
from moa_core.routing.subject_area import routed_blocks
from moa_core.routing.trace import BINS, Trace

BLOCKS = [Address("input", n, 0) for n in range(1, 9)] + [Address("output", n, 0) for n in range(8)]


def test_maps_are_means_over_the_steps_of_a_bin():
    trace = Trace((4, 6), BLOCKS)
    layer = (BLOCKS[2], "attn2")
    for timestep, value in ((990.0, 0.2), (910.0, 0.4), (10.0, 1.0)):
        trace.add(timestep, {layer: torch.full((2, 4, 6), value)})
    assert trace.timesteps == [(900, 1000), (0, 100)]
    maps = trace.maps(layer)
    assert maps.shape == (2, 2, 4, 6)
    assert torch.allclose(maps[:, 0], torch.tensor(0.3)) and torch.allclose(maps[:, 1], torch.tensor(1.0))


def test_a_trace_does_not_grow_with_the_steps():
    trace = Trace((4, 4), BLOCKS)
    for timestep in range(999, -1, -1):
        trace.add(float(timestep), {(BLOCKS[0], "attn1"): torch.rand(1, 4, 4)})
    assert len(trace.timesteps) == BINS


def test_blocks_at_both_ends_are_not_routed():
    """As many as the paper leaves out of SD 1.5; in a smaller U-Net fewer, and never all."""
    assert routed_blocks(BLOCKS) == BLOCKS[2:-3]
    assert routed_blocks(BLOCKS[:7]) == BLOCKS[1:6]
    assert all(routed_blocks(BLOCKS[:count]) for count in range(1, 17))


def test_the_subject_area_is_read_off_the_routed_blocks_at_latent_size():
    """Of sixteen blocks all but the first two and last three; layers of several sizes, odd ones too."""
    trace = Trace((5, 7), BLOCKS)
    shares = {}
    for number, block in enumerate(BLOCKS):
        size = (5, 7) if number in (0, 2) else (3, 4)
        shares[block, "attn1"] = torch.full((1, *size), 0.5 if block in BLOCKS[2:-3] else 0.0)
    shares[BLOCKS[2], "attn1"][0, 0, 0] = 1.0
    trace.add(500.0, shares)
    area = trace.subject_area()
    assert area.shape == (1, 5, 7)
    assert torch.allclose(area[0, -1, -1], torch.tensor(0.5))
    assert area[0, 0, 0] == pytest.approx(0.5 + 0.5 / 11)


def test_a_layer_may_change_its_size_or_be_skipped():
    """As with Deep Shrink, and with caches that skip blocks or the whole U-Net."""
    trace, layer, other = Trace((4, 4), BLOCKS), (BLOCKS[2], "attn1"), (BLOCKS[3], "attn1")
    trace.add(950.0, {})
    assert not trace
    trace.add(950.0, {layer: torch.full((1, 2, 3), 0.2), other: torch.full((1, 2, 2), 0.5)})
    trace.add(940.0, {layer: torch.full((1, 4, 4), 0.4)})
    trace.add(50.0, {layer: torch.full((1, 4, 4), 1.0)})
    assert trace.layers == [layer, other]
    assert torch.allclose(trace.maps(layer), torch.tensor([0.3, 1.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4))
    assert torch.allclose(trace.maps(other)[:, 0], torch.tensor(0.5)) and not trace.maps(other)[:, 1].any()
    assert torch.allclose(trace.subject_area(), torch.tensor((0.65 + 0.5) / 2))


def test_pictures_painted_in_turns_are_one_batch():
    trace, layer = Trace((2, 2), BLOCKS), (BLOCKS[2], "attn2")
    for pictures in ([0, 1], [1, 2]):
        trace.add(500.0, {layer: torch.tensor(pictures).float().view(2, 1, 1).expand(2, 2, 2)}, pictures)
    assert trace.maps(layer)[:, 0, 0, 0].tolist() == [0.0, 1.0, 2.0]
    assert trace.subject_area().shape == (3, 2, 2)
