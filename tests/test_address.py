"""Addresses of attention layers, in LDM's and in diffusers' names."""

from hypothesis import given
from hypothesis import strategies as st

from moa_core.address import Address, attention_weights, block_shapes
from training.host.ldm_names import unet_to_ldm


def test_the_addresses_of_stable_diffusion_15():
    """The published layout of SD 1.5: diffusers' names against LDM's."""
    pairs = {
        "down_blocks.0.attentions.0": "input.1.0",
        "down_blocks.0.attentions.1": "input.2.0",
        "down_blocks.1.attentions.0": "input.4.0",
        "down_blocks.2.attentions.1": "input.8.0",
        "mid_block.attentions.0": "middle.0.0",
        "up_blocks.1.attentions.0": "output.3.0",
        "up_blocks.3.attentions.2": "output.11.0",
    }
    for diffusers, address in pairs.items():
        name = f"{diffusers}.transformer_blocks.0.attn1.to_q.weight"
        assert str(Address.from_diffusers(name, layers_per_block=2)) == address


@given(
    st.sampled_from(["down", "mid", "up"]),
    st.integers(0, 3),
    st.integers(0, 3),
    st.integers(0, 9),
    st.integers(1, 4),
)
def test_every_address_comes_back_from_both_names(side, level, place, index, layers_per_block):
    place = min(place, layers_per_block if side == "up" else layers_per_block - 1)
    block = "mid_block" if side == "mid" else f"{side}_blocks.{level}"
    name = f"{block}.attentions.{0 if side == 'mid' else place}.transformer_blocks.{index}"
    address = Address.from_diffusers(name, layers_per_block)
    assert address.to_diffusers(layers_per_block) == name
    assert Address.from_ldm("model.diffusion_model." + address.to_ldm() + ".attn2.to_k.weight") == address
    assert Address.parse(str(address)) == address


def test_weights_are_found_under_both_names_in_the_order_of_the_forward_pass(toy_base):
    weights = toy_base.unet.state_dict()
    ldm = {f"model.diffusion_model.{name}": weight for name, weight in unet_to_ldm(weights, 1).items()}
    found = attention_weights(weights)
    assert block_shapes(ldm) == block_shapes(weights)
    assert [str(a) for a in found] == [
        "input.1.0", "input.3.0", "middle.0.0", "output.0.0", "output.1.0", "output.2.0", "output.3.0"
    ]  # fmt: skip
    for address, own in attention_weights(ldm).items():
        assert all(own[name] is found[address][name] for name in own) and len(own) == 10
