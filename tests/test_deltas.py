"""Deltas of one layer: each part's change where its subject is, in few calls, whatever the number of subjects."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from launched_calls import Calls
from torch import nn

from moa_core.adapters.deltas import Amounts, Deltas, Difference, LayerDeltas, LowRank, deltas_of
from moa_core.adapters.layer_hooks import deltas_on
from moa_core.adapters.run import Adapters
from moa_core.address import block_shapes
from moa_core.run import Run
from moa_core.subjects.binding import Binding
from moa_core.subjects.rows import Row
from moa_core.subjects.subject import Subject
from moa_core.subjects.view import View
from training.host.adapter import MoAUNet
from training.host.lora import read_lora
from training.host.prior import prior_of
from training.toy.pretrain.lora import save_lora, with_fresh_lora
from training.toy.pretrain.low_rank import low_rank_updates

SIZE = (4, 6)
LAYERS = {
    "linear": lambda: nn.Linear(8, 12),
    "convolution": lambda: nn.Conv2d(8, 12, 3, padding=1),
    "smaller": lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1),
    "projection": lambda: nn.Conv2d(8, 12, 1),
}


def change(layer: nn.Module, rank: int, random: torch.Generator):
    """A random change of a layer: of that rank, or 0: a whole difference."""
    shape = layer.weight.shape
    if rank:
        return LowRank(*(torch.randn(*size, generator=random) for size in ((shape[0], rank), (rank, *shape[1:]))))
    return Difference(torch.randn(shape, generator=random), torch.randn(shape[0], generator=random))


def alone(layer: nn.Module, x: torch.Tensor, one) -> torch.Tensor:
    """What a change adds to the layer's output, everywhere."""
    low = isinstance(one, LowRank)
    weight = (one.up @ one.down.flatten(1)).view(layer.weight.shape) if low else one.weight
    bias = None if low else one.bias
    if isinstance(layer, nn.Conv2d):
        return nn.functional.conv2d(x, weight, bias, layer.stride, layer.padding)
    return nn.functional.linear(x, weight, bias)


@pytest.mark.parametrize("kind", LAYERS)
@given(ranks=st.lists(st.integers(0, 5), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_every_part_is_added_where_it_is_and_as_much_of_it(kind, ranks, seed):
    random = torch.Generator().manual_seed(seed)
    layer = LAYERS[kind]()
    changes = {part: change(layer, rank, random) for part, rank in enumerate(ranks)}
    x = torch.randn(2, 8, *SIZE, generator=random)
    x = x if isinstance(layer, nn.Conv2d) else x.flatten(2).mT
    with torch.no_grad():
        out = layer(x)
        size = out.shape[2:] if out.ndim == 4 else SIZE
        amounts = torch.rand(2, len(ranks), *size, generator=random) * (torch.rand(2, len(ranks), 1, 1) > 0.3)
        expected = out.clone()
        for part, one in changes.items():
            here = amounts[:, part : part + 1]
            expected += alone(layer, x, one) * (here if out.ndim == 4 else here.flatten(2).mT)
        added = LayerDeltas(layer, changes)(x, out, Amounts(amounts))
    torch.testing.assert_close(added, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("subjects", [1, 2, 5])
def test_a_changed_layer_launches_three_calls_more_whatever_the_number_of_subjects(kind, subjects):
    layer, random = LAYERS[kind](), torch.Generator().manual_seed(0)
    deltas = LayerDeltas(layer, {part: change(layer, 4, random) for part in range(subjects)})
    x = torch.randn(2, 8, *SIZE) if isinstance(layer, nn.Conv2d) else torch.randn(2, 24, 8)
    with torch.no_grad():
        out = layer(x)
        amounts = Amounts(torch.rand(2, subjects, *(out.shape[2:] if out.ndim == 4 else SIZE)))
        deltas(x, out, amounts)  # the amounts of a step are laid out once for all its layers
        with Calls() as calls:
            deltas(x, out, amounts)
    assert len(calls.names) <= 3, calls.names


def test_weights_of_another_type_are_taken_as_they_come():
    """As where the host has left them elsewhere: its own layers cast them."""

    class Casting:
        class Linear(nn.Linear):
            def forward(self, x):
                return nn.functional.linear(x, self.weight.to(x))

    layer, random = nn.Linear(8, 12), torch.Generator().manual_seed(0)
    changes = {0: change(layer, 4, random)}
    x, amounts = torch.randn(2, 24, 8), Amounts(torch.rand(2, 1, *SIZE))
    with torch.no_grad():
        exact = LayerDeltas(layer, changes)(x, layer(x), amounts)
        half = LayerDeltas(layer, changes, Casting).half()(x, layer(x), amounts)
    torch.testing.assert_close(half, exact, atol=2e-2, rtol=2e-2)


def test_hooks_are_gone_whatever_ends_the_block():
    network = nn.Module()
    network.proj_in = nn.Conv2d(8, 12, 1)
    deltas = Deltas({"proj_in": LayerDeltas(network.proj_in, {0: change(network.proj_in, 4, torch.Generator())})}, 1)
    x = torch.randn(2, 8, *SIZE)
    plain = network.proj_in(x)
    with (
        pytest.raises(ZeroDivisionError),
        deltas_on(network.get_submodule, deltas, lambda: lambda name, x, out, size: out + 1),
    ):
        torch.testing.assert_close(network.proj_in(x), plain + 1)
        raise ZeroDivisionError
    assert torch.equal(network.proj_in(x), plain)


@torch.no_grad()
def test_in_diffusers_a_lora_over_the_whole_picture_is_pefts(toy_base, tmp_path):
    """A positive and a negative row; the text is the prompt's own, which the LoRA's layers read."""
    unet, random = copy.deepcopy(toy_base.unet), torch.Generator().manual_seed(0)
    with torch.enable_grad():
        theirs = with_fresh_lora(copy.deepcopy(unet), 4, ("to_", "proj_", "ff.net", "conv1", "conv2"))
    for _, up, down in low_rank_updates(theirs):
        for factor in (up, down):
            factor.copy_((0.2 * torch.randn(factor.shape, generator=random)).half())
    save_lora(theirs, tmp_path / "some.safetensors")
    person = Subject(torch.ones(1, 1), "man", "man", area=torch.ones(1, 16, 16))
    deltas = deltas_of(unet, [read_lora(unet, tmp_path / "some.safetensors")])
    rows = [Row(View(0), (Binding(3, person),), 77, True), Row(View(0), (), 77, False)]
    latents, context = torch.randn(2, 4, 16, 16, generator=random), torch.randn(2, 77, 64, generator=random)
    timestep = torch.tensor([500.0, 500.0])
    prior, expected = (each(latents, timestep, context).sample for each in (unet, theirs))
    adapters = Adapters({}, {person: [0]}, deltas)
    run = Run([person], 1, (16, 16), [500.0], block_shapes(unet.state_dict()), adapters=adapters)
    call = run.call(rows, 500.0, latents, context, timestep, prior_of(unet))
    ours = MoAUNet(unet, None).run(latents, timestep, context, call)
    effect = (expected - prior).abs().max()
    assert effect > 0.1 and (ours - expected).abs().max() < 1e-5 * effect
    assert not run.wants_scouting
