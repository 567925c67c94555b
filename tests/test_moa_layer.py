"""Mixing, sparse routing, and the subject prompt."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from moa_core.learned.joined_layer import joined
from moa_core.learned.moa import MoA
from moa_core.learned.moa_layer import GATHERED_FROM, MoALayer
from moa_core.learned.unet_call import BoundTokens, UNetCall
from moa_core.routing.subject_area import Pixels, SubjectArea
from moa_core.routing.trace import Trace
from moa_core.subjects.subject import Subject
from moa_core.subjects.view import View
from toy_world.shape import IMAGE_ENCODER


def layer(seed: int, cross: bool) -> MoALayer:
    """In float64, so that rounding does not show."""
    torch.manual_seed(seed)
    made = MoALayer(dim=32, context_dim=24 if cross else None, heads=4, router_hidden=16)
    made.router.choice.weight.data *= 30
    return made.double().eval()


def exact(*size: int) -> torch.Tensor:
    return torch.randn(*size, dtype=torch.float64)


def some_pixels(inside: torch.Tensor) -> Pixels:
    """Those of a layer where inside [B, N]; rows with fewer than others are filled up with what comes next."""
    index = inside.float().argsort(dim=1, descending=True)[:, : int(inside.sum(dim=1).max())]
    return Pixels(index, inside.float())


@torch.no_grad()
@settings(max_examples=40)
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 3),
    pixels=st.integers(1, 70),
    cross=st.booleans(),
    part=st.floats(0.0, 1.0),
    strength=st.sampled_from([0.05, 0.5, 1.0, 2.0]),
    gathered=st.booleans(),
)
def test_sparse_is_dense_inside_the_area_and_the_prior_outside(seed, rows, pixels, cross, part, strength, gathered):
    """Whether the pixels that ask are gathered, or the others have zero shares."""
    moa_layer = layer(seed, cross)
    h, prior = exact(rows, pixels, 32), exact(rows, pixels, 32)
    context = exact(rows, 7, 24) if cross else None
    dense = moa_layer(h, prior, context, strength=strength)
    expert = moa_layer.expert(h, h if context is None else context)
    share = (moa_layer.router(h)[..., 1] * strength).clamp(0, 1)[..., None]
    assert torch.allclose(dense.out, (1 - share) * prior + share * expert)
    assert (dense.share >= 0).all() and (dense.share <= 1).all()

    inside = torch.rand(rows, pixels) < part
    chosen = some_pixels(inside)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(GATHERED_FROM, "cpu", 0 if gathered else 1e9)
        sparse = moa_layer(h, prior, context, chosen, strength)
    assert torch.allclose(sparse.out[inside], dense.out[inside])
    assert torch.equal(sparse.out[~inside], prior[~inside])  # untouched, not merely close
    assert torch.equal(sparse.share, dense.share.where(inside, 0.0)) and torch.equal(sparse.wanted, dense.share)


@torch.no_grad()
def test_sparse_attends_with_the_chosen_queries_alone_where_that_pays(monkeypatch):
    monkeypatch.setitem(GATHERED_FROM, "cpu", 400 * 32)
    moa_layer = layer(0, cross=False)
    asked = []
    moa_layer.expert.to_out[0].register_forward_hook(lambda module, args, out: asked.append(args[0].shape[1]))
    for pixels in (400, 399):
        h, prior = exact(2, pixels, 32), exact(2, pixels, 32)
        inside = torch.rand(2, pixels) < 0.3
        moa_layer(h, prior, None, some_pixels(inside))
        assert asked.pop() == (int(inside.sum(dim=1).max()) if pixels == 400 else 399)


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)])
def test_a_joined_mixture_is_the_mixture(stirred_moa, dtype, tolerance):
    """What is joined gives the same numbers, in every layer and whatever it is stored as."""
    mixture = copy.deepcopy(stirred_moa.mixture).to(dtype)
    fewer = joined(mixture, dtype=dtype)
    for address, attention in mixture.config.layers:
        h, prior = (torch.randn(2, 36, mixture.config.blocks[address].dim).to(dtype) for _ in range(2))
        context = torch.randn(2, 77, 64).to(dtype) if attention == "attn2" else None
        ours, theirs = (each.layer(address, attention)(h, prior, context) for each in (fewer, mixture))
        assert (ours.out - theirs.out).abs().max() < tolerance * theirs.out.abs().max()
        assert (ours.share - theirs.share).abs().max() < tolerance
    assert theirs.share.std() > 0.01


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for the device: some operations, and what is fetched from it, `Tensor.cpu`."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __enter__(self):
        self._fetch = torch.Tensor.cpu

        def counted(tensor):
            self.count += 1
            return self._fetch(tensor)

        torch.Tensor.cpu = counted
        return super().__enter__()

    def __exit__(self, *raised):
        torch.Tensor.cpu = self._fetch
        return super().__exit__(*raised)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select)
        self.count += function.overloadpacket in waits
        return function(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("sparse", [True, False])
def test_no_layer_makes_the_host_wait_for_an_accelerator(stirred_moa, sparse):
    mixture, address = stirred_moa.mixture, list(stirred_moa.mixture.config.blocks)[1]
    generator = torch.Generator().manual_seed(0)
    h, latents = torch.randn(2, 256, mixture.config.blocks[address].dim, generator=generator), torch.zeros(2, 4, 16, 16)
    run, views = SubjectArea(1, (16, 16), 20.0, mixture.config.blocks), [View(0), View(0)]
    bound = BoundTokens.stack([(0, 3, torch.randn(64, generator=generator))])
    trace = Trace((16, 16), mixture.config.blocks)
    cut = []
    for level in (30.0, 20.0, 10.0):
        with HostReads() as waits:
            area = run.at(level, views, latents) if sparse else None
        assert (waits.count > 0) == (area is not None)  # once a step; and the count counts
        with HostReads() as reads:
            call = UNetCall(mixture, torch.randn(2, 77, 64), torch.tensor([5.0, 5.0]), bound, area=area)
            for attention in ("attn1", "attn2"):
                call.mix(address, attention, h, h.flip(1), (16, 16))
            trace.add(5.0, call.shares)
            run.add(call.wanted, {0: View(0)}, latents)
        assert reads.count == 0
        cut.append(bool((call.shares[address, "attn1"] == 0).any()))
    assert cut == [False, sparse, sparse]


@torch.no_grad()
def test_a_fresh_moa_is_its_prior(toy_base):
    """Experts equal the prior's attention, routers are neutral, the subject prompt is the text."""
    moa = toy_base.fresh_moa(IMAGE_ENCODER)
    unet_attention = toy_base.unet.down_blocks[1].attentions[0].transformer_blocks[0]
    address = list(moa.config.blocks)[1]
    h, context = torch.randn(2, 64, 128), torch.randn(2, 77, 64)
    for attention, other in (("attn1", h), ("attn2", context)):
        expected = getattr(unet_attention, attention)(h, None if attention == "attn1" else context)
        made = moa.mixture.layer(address, attention)
        assert torch.allclose(made.expert(h, other), expected, atol=1e-5)
        assert torch.equal(made.router(h), torch.full((2, 64, 2), 0.5))
    bound = BoundTokens.stack([(1, 5, torch.randn(64))])
    call = UNetCall(moa.mixture, context, torch.tensor([10.0, 900.0]), bound)
    assert torch.equal(call.subject_prompt(address), context)


@torch.no_grad()
def test_the_subject_prompt_differs_by_feature_layer_and_timestep_at_bound_tokens_alone(stirred_moa):
    mixture = stirred_moa.mixture
    context = torch.randn(2, 77, 64)
    first, second = list(mixture.config.blocks)[:2]

    def prompt(feature, timestep, address):
        call = UNetCall(mixture, context, torch.full((2,), timestep), BoundTokens.stack([(1, 5, feature)]))
        return call.subject_prompt(address)

    feature = torch.randn(64)
    base = prompt(feature, 500.0, first)
    untouched = torch.ones(2, 77, dtype=torch.bool)
    untouched[1, 5] = False
    assert torch.equal(base[untouched], context[untouched])
    for other in (
        prompt(-feature, 500.0, first),
        prompt(feature, 100.0, first),
        prompt(feature, 500.0, second),
        context,
    ):
        assert (base[1, 5] - other[1, 5]).abs().max() > 1e-3


def test_from_prior_refuses_weights_that_do_not_fit_the_config(toy_base):
    weights = toy_base.unet.state_dict()
    config = toy_base.fresh_moa(IMAGE_ENCODER).config
    fewer = {k: v for k, v in weights.items() if "mid_block" not in k}
    with pytest.raises(ValueError, match=r"7 transformer blocks.*6.*for_unet"):
        MoA.from_prior(fewer, config)
    with pytest.raises(ValueError, match="blocks is empty"):
        MoA.from_prior({"nothing": torch.zeros(1)})


@pytest.mark.parametrize("index", [0, 2, 3, 7])
def test_variants_match_pictures_by_index(index):
    subject = Subject(torch.arange(3.0)[:, None], "man", "man")
    assert subject.feature(index).item() == index % 3
