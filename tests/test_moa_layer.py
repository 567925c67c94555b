"""Mixing, sparse routing and its bound, and the subject prompt."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from moa_core.moa import MoA
from moa_core.moa_layer import SPARSE_THRESHOLD, MoALayer, SparsePlan
from moa_core.subject import Subject
from moa_core.trace import Trace
from moa_core.unet_call import BoundTokens, UNetCall
from toy_world.shape import IMAGE_ENCODER


def layer(seed: int, sharpness: float) -> MoALayer:
    torch.manual_seed(seed)
    made = MoALayer(dim=32, context_dim=24, heads=4, router_hidden=16)
    made.router.choice.weight.data *= sharpness
    return made.eval()


@torch.no_grad()
@settings(max_examples=40)
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 3),
    pixels=st.integers(1, 70),
    cross=st.booleans(),
    sharpness=st.sampled_from([1.0, 30.0, 300.0]),
    strength=st.sampled_from([0.05, 0.5, 1.0, 2.0]),
)
def test_sparse_keeps_its_bound_and_strength_its_meaning(seed, rows, pixels, cross, sharpness, strength):
    moa_layer = layer(seed, sharpness)
    h, prior = torch.randn(rows, pixels, 32), torch.randn(rows, pixels, 32)
    context = torch.randn(rows, 7, 24 if cross else 32) if cross else None
    moa_layer.expert.to_k = torch.nn.Linear(24 if cross else 32, 32, bias=False)
    moa_layer.expert.to_v = torch.nn.Linear(24 if cross else 32, 32, bias=False)
    dense = moa_layer.dense(h, prior, context, strength)
    expert = moa_layer.expert(h, h if context is None else context)
    share = (moa_layer.router(h)[..., 1] * strength).clamp(0, 1)[..., None]
    assert torch.allclose(dense.out, (1 - share) * prior + share * expert, atol=1e-5)
    assert (dense.share >= 0).all() and (dense.share <= 1).all()

    sparse = moa_layer.sparse(h, prior, context, strength)
    error, bound = (sparse.out - dense.out).abs(), SPARSE_THRESHOLD * (expert - prior).abs()
    assert (error <= bound + 1e-5).all()
    chosen = dense.share > SPARSE_THRESHOLD
    assert torch.allclose(sparse.out[chosen], dense.out[chosen], atol=1e-5)
    assert torch.equal(sparse.out[~chosen], prior[~chosen])  # untouched, not merely close

    row = moa_layer.sparse(h[-1:], prior[-1:], None if context is None else context[-1:], strength)
    assert torch.allclose(row.out, sparse.out[-1:], atol=1e-5)  # rows do not see each other


@torch.no_grad()
def test_sparse_computes_only_the_chosen_queries():
    moa_layer = layer(0, 300.0)
    h, prior = torch.randn(2, 400, 32), torch.randn(2, 400, 32)
    moa_layer.expert.to_k = moa_layer.expert.to_v = torch.nn.Linear(32, 32, bias=False)
    asked = []
    moa_layer.expert.to_q.register_forward_hook(lambda module, args, out: asked.append(args[0].shape[1]))
    shares = moa_layer.sparse(h, prior).share
    assert asked == [int((shares > 0).sum(dim=1).max())] and 0 < asked[0] < 400


@torch.no_grad()
def test_a_plan_foretells_the_next_call_and_notices_a_call_that_it_cut_short():
    moa_layer = layer(0, 300.0)
    moa_layer.expert.to_k = moa_layer.expert.to_v = torch.nn.Linear(32, 32, bias=False)
    plan, place = SparsePlan(), ("layer", 4000)
    h, prior = torch.randn(1, 4000, 32), torch.randn(1, 4000, 32)
    few = h.clone()
    few[:, 500:] = few[:, :1]  # most pixels alike
    few_is_off = moa_layer.sparse(few, prior)
    if few_is_off.share[0, 600] > 0:
        few[:, 500:] = h[:, moa_layer.sparse(h, prior).share[0] == 0][:, :1]

    def call(x):
        mixed = moa_layer.sparse(x, prior, capacity=plan.capacity(place, 4000))
        return mixed, plan.settle({place: mixed.chosen})

    first, complete = call(few)
    assert complete and plan.capacity(place, 4000) < 1000
    second, complete = call(few)
    assert complete and torch.allclose(second.out, first.out, atol=1e-5)
    third, complete = call(h)
    assert not complete
    assert not torch.allclose(third.out, moa_layer.sparse(h, prior).out, atol=1e-3)
    fourth, complete = call(h)
    assert complete and torch.allclose(fourth.out, moa_layer.sparse(h, prior).out, atol=1e-5)


@torch.no_grad()
def test_a_unet_call_on_a_plan_agrees_with_one_that_reads_the_device(stirred_moa):
    """What an accelerator does, computed here: the same result after the plan has settled."""
    mixture = stirred_moa.mixture
    context, timestep = torch.randn(2, 77, 64), torch.tensor([500.0, 500.0])
    bound = BoundTokens.stack([(0, 3, torch.randn(64))])
    inputs = {
        (address, attention): (torch.randn(2, 256, shape.dim), torch.randn(2, 256, shape.dim))
        for address, shape in mixture.config.blocks.items()
        for attention in ("attn1", "attn2")
    }
    plan = SparsePlan()
    outs = []
    for sparse in (plan, plan, True):
        call = UNetCall(mixture, context, timestep, bound, sparse=sparse)
        outs.append([call.mix(*place, h, prior) for place, (h, prior) in inputs.items()])
        assert call.complete()
    for planned, settled, read in zip(*outs, strict=True):
        assert torch.allclose(planned, read, atol=1e-5) and torch.allclose(settled, read, atol=1e-5)


class HostReads(TorchDispatchMode):
    """Counts the operations that make the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select)
        self.count += function.overloadpacket in waits
        return function(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("sparse", ["plan", None])
def test_no_layer_makes_the_host_wait_for_an_accelerator(stirred_moa, sparse):
    mixture, h = stirred_moa.mixture, torch.randn(2, 256, 64)
    address = next(iter(mixture.config.blocks))
    plan = SparsePlan() if sparse else None
    bound = BoundTokens.stack([(0, 3, torch.randn(64))])
    trace = Trace((16, 16))
    for _ in range(2):
        with HostReads() as reads:
            call = UNetCall(mixture, torch.randn(2, 77, 64), torch.tensor([5.0, 5.0]), bound, sparse=plan)
            for attention in ("attn1", "attn2"):
                call.mix(address, attention, h, torch.randn(2, 256, 64))
            trace.add(5.0, {layer: share.unflatten(1, (16, 16)) for layer, share in call.shares.items()})
        assert reads.count == 0
        call.complete()
    with HostReads() as reads:  # and the count counts: reading at every layer is seen
        UNetCall(mixture, torch.randn(2, 77, 64), torch.tensor([5.0, 5.0]), sparse=True).mix(address, "attn1", h, h)
    assert reads.count > 0


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
