"""IP-Adapter files, read and applied as diffusers does it: random weights in the layout of the published files."""

import copy
import dataclasses
import re

import pytest
import torch
from adapter_runs import image_run
from diffusers import UNet2DConditionModel
from ip_adapter_files import random_file
from safetensors.torch import save_file
from sdxl import TINY, added_conditions, sdxl_unet

from moa_core.adapters.image_expert import file_order
from moa_core.adapters.ip_adapter_file import IPAdapterFileError, load_ip_adapter, vision_model
from moa_core.address import Address, BlockShape, block_shapes
from moa_core.attention import attend
from moa_core.files.file_error import LONGEST_SENTENCE
from moa_core.subjects.binding import Binding
from moa_core.subjects.rows import Row
from moa_core.subjects.subject import Subject
from moa_core.subjects.view import View
from toy_world.shape import TEXT_ENCODER
from training.host import sd15
from training.host.adapter import MoAUNet
from training.host.prior import prior_of

DIM = TEXT_ENCODER["hidden_size"]


def diffusers_dict(weights: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """As load_ip_adapter splits a file."""
    parts: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, weight in weights.items():
        part, rest = name.split(".", 1)
        parts[part][rest] = weight
    return parts


def pictures(kind: str, count: int, width: int = 48) -> torch.Tensor:
    """What a CLIP vision model could say of that many pictures."""
    size = (count, width) if kind == "base" else (count, 257, width)
    return torch.randn(*size, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def unet(toy_base):
    return copy.deepcopy(toy_base.unet)


def written(tmp_path, weights, name="ip-adapter.safetensors"):
    save_file(weights, tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("strength", [1.0, 0.6, 2.0])
@pytest.mark.parametrize("kind", ["base", "plus", "full-face"])
def test_with_a_share_of_1_everywhere_it_is_the_ip_adapter_of_diffusers(tmp_path, unet, kind, strength):
    check_parity(tmp_path, unet, kind, strength)


@pytest.mark.parametrize("kind", ["base", "plus"])
def test_so_it_is_on_all_70_cross_attentions_of_sdxl_at_a_tenth_of_its_width(tmp_path, kind):
    torch.manual_seed(0)
    unet = sdxl_unet(**TINY)
    assert len(block_shapes(unet.state_dict())) == 70
    check_parity(tmp_path, unet, kind, 1.0)


def test_so_it_is_on_all_16_cross_attentions_of_sd_15_at_a_tenth_of_its_width(tmp_path):
    torch.manual_seed(0)
    channels = (32, 64, 128, 128)
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=channels, cross_attention_dim=DIM, norm_num_groups=8
    ).eval()
    assert len(block_shapes(unet.state_dict())) == 16
    check_parity(tmp_path, unet, "plus", 1.0)


@torch.no_grad()
def check_parity(tmp_path, unet, kind: str, strength: float) -> None:
    """A positive and a negative row, both with a share of 1 everywhere, beside diffusers' load_ip_adapter."""
    blocks, width = block_shapes(unet.state_dict()), unet.config.cross_attention_dim
    weights = random_file(kind, [blocks[a] for a in file_order(blocks)], width)
    adapter = load_ip_adapter(written(tmp_path, weights))
    theirs = copy.deepcopy(unet)
    theirs._load_ip_adapter_weights([diffusers_dict(weights)])
    for processor in theirs.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [strength]

    random = torch.Generator().manual_seed(1)
    latents, context = torch.randn(2, 4, 16, 16, generator=random), torch.randn(2, 77, width, generator=random)
    timestep, added = torch.tensor([500.0, 500.0]), added_conditions(2) if adapter.family == "SDXL" else {}
    picture, nobody = pictures(kind, 1), pictures(kind, 1) * (0 if kind == "base" else -0.5)
    embeds = torch.cat([picture, nobody])[:, None]  # one picture a row: the second row is the negative one's
    expected = theirs(latents, timestep, context, added_cond_kwargs={"image_embeds": [embeds], **added}).sample
    prior = unet(latents, timestep, context, added_cond_kwargs=added).sample

    adapter.mixture.negative = adapter.projector(nobody)[0]
    person = Subject(adapter.projector(picture).flatten(1), "man", "man", area=torch.ones(1, 16, 16))
    rows = [Row(View(0), (Binding(3, person),), 77, True), Row(View(0), (), 77, False)]
    run = image_run(adapter.mixture, [person], blocks, strength)
    call = run.call(rows, 500.0, latents, context, timestep, prior_of(unet))
    ours = MoAUNet(unet, None).run(latents, timestep, context, call, added_cond_kwargs=added)

    effect = (expected - prior).abs().max()
    difference = ((ours - expected).abs().max() / effect).item()
    print(f"{kind} at {strength}: max abs difference {difference:.1e} of the effect {effect:.2f}")
    assert effect > 0.1 and difference < 1e-5
    assert all(torch.equal(share, torch.ones_like(share) * min(strength, 1.0)) for share in call.shares.values())


@torch.no_grad()
def test_several_people_are_each_themselves_where_they_are_and_elsewhere_is_the_prior(tmp_path, unet):
    """One layer, by hand: every pixel attends to the tokens of its own person alone."""
    blocks = block_shapes(unet.state_dict())
    adapter = load_ip_adapter(written(tmp_path, random_file("base", [blocks[a] for a in file_order(blocks)], DIM)))
    address = file_order(blocks)[0]
    tokens = adapter.projector(pictures("base", 2))
    left, right = torch.zeros(1, 16, 16), torch.zeros(1, 16, 16)
    left[..., :5], right[..., 11:] = 1, 1
    people = [
        Subject(tokens[n].flatten()[None], "man", "man", weight, area)
        for n, (weight, area) in enumerate([(1.0, left), (0.5, right)])
    ]
    rows = [Row(View(0), tuple(Binding(n + 3, p) for n, p in enumerate(people)), 77, True)]
    run = image_run(adapter.mixture, people, blocks)
    random = torch.Generator().manual_seed(2)
    h, prior = (torch.randn(1, 256, blocks[address].dim, generator=random) for _ in range(2))
    latents, context = torch.zeros(1, 4, 16, 16), torch.randn(1, 77, DIM, generator=random)
    call = run.call(rows, 500.0, latents, context, torch.tensor([500.0]), prior_of(unet))
    mixed = call.mix(address, "attn2", h, prior, (16, 16)).unflatten(1, (16, 16))
    at = prior.unflatten(1, (16, 16))
    expert, own = adapter.mixture.layers[0], prior_of(unet)(address)
    seen = [attend(own.to_q(h), *expert.keys_values(tokens[n][None]), own.heads) for n in range(2)]
    alone = [at + own.out(each).unflatten(1, (16, 16)) for each in seen]
    torch.testing.assert_close(mixed[:, :, :5], alone[0][:, :, :5])
    torch.testing.assert_close(mixed[:, :, 11:], torch.lerp(at, alone[1], 0.5)[:, :, 11:])
    torch.testing.assert_close(mixed[:, :, 5:11], at[:, :, 5:11])


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda w: {n.replace("image_proj.proj.", "image_proj.proj.0."): v for n, v in w.items()}, "damaged.*proj.2"),
        (lambda w: w | {"ip_adapter.0.to_q_lora.down.weight": torch.zeros(2, 2)}, "damaged.*0.to_q_lora.up"),
        (lambda w: w | {"image_proj.latents": torch.zeros(1, 16, 2048)}, "Kolors"),
        (lambda w: w | {"ip_adapter.double_blocks.0.processor.weight": torch.zeros(2, 2)}, "Flux"),
        (lambda w: {n: v for n, v in w.items() if n.startswith("image")}, "expected weights named"),
        (lambda w: {n: v for n, v in w.items() if n != "ip_adapter.1.to_v_ip.weight"}, "1.to_v_ip.weight"),
        (lambda w: w | {"image_proj.proj.weight": torch.zeros(3, 3)}, "size mismatch"),
        (lambda w: w | {"ip_adapter.1.to_k_ip.weight": torch.zeros(64, 7)}, "7"),
    ],
)
def test_other_files_are_refused_in_a_sentence_that_names_the_right_ones(tmp_path, toy_base, change, found):
    blocks = block_shapes(toy_base.unet.state_dict())
    weights = change(random_file("base", [blocks[a] for a in file_order(blocks)], DIM))
    with pytest.raises(IPAdapterFileError, match=f"strange.*{found}.*ip-adapter.*_sd15") as refusal:
        load_ip_adapter(written(tmp_path, weights, "strange.safetensors"))
    assert len(str(refusal.value)) <= LONGEST_SENTENCE and "\n" not in str(refusal.value)


def test_damaged_and_missing_files_say_what_to_do(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"12345")
    with pytest.raises(IPAdapterFileError, match=r"cut\.safetensors.*5 bytes.*download"):
        load_ip_adapter(tmp_path / "cut.safetensors")
    with pytest.raises(IPAdapterFileError, match="models/ipadapter"):
        load_ip_adapter(tmp_path / "none.safetensors")


SD15_PLACES = {"input": (1, 2, 4, 5, 7, 8), "output": range(3, 12), "middle": (0,)}
SDXL_PLACES = {"input": (4, 5, 7, 8), "output": range(6), "middle": (0,)}
SDXL_SHALLOW = {("input", 4), ("input", 5), ("output", 3), ("output", 4), ("output", 5)}


@pytest.mark.parametrize(
    ("make", "places", "depth"),
    [
        (sd15.unet, SD15_PLACES, lambda kind, block: 1),
        (sdxl_unet, SDXL_PLACES, lambda kind, block: 2 if (kind, block) in SDXL_SHALLOW else 10),
    ],
)
def test_a_file_numbers_its_layers_as_diffusers_numbers_attentions(make, places, depth):
    """Encoder, decoder, middle; each block's transformers in their order."""
    with torch.device("meta"):
        unet = make()
    addresses = file_order(block_shapes(unet.state_dict()))
    cross = [name for name in unet.attn_processors if ".attn2." in name]
    assert addresses == [Address.from_diffusers(name, 2) for name in cross]
    assert [str(address) for address in addresses] == [
        f"{kind}.{block}.{index}"
        for kind, blocks in places.items()
        for block in blocks
        for index in range(depth(kind, block))
    ]
    assert [address.to_diffusers(2) + ".attn2.processor" for address in addresses] == cross


def test_a_subject_keeps_its_weight_and_area_through_a_copy():
    area = torch.rand(1, 8, 8)
    subject = Subject(torch.zeros(1, 4), "man", "man", 0.5, area)
    assert dataclasses.replace(subject, word="woman").area is area


@pytest.mark.parametrize(
    ("kind", "width", "found"),
    [
        ("base", 1024, "ViT-H-14 .*/IP-Adapter/tree/main/models/image_encoder"),  # ip-adapter_sd15
        ("base", 1280, "ViT-bigG-14 .*/IP-Adapter/tree/main/sdxl_models/image_encoder"),  # ip-adapter_sdxl
        ("plus", 1280, "ViT-H-14 .*/IP-Adapter/tree/main/models/image_encoder"),
    ],
)
def test_a_file_says_which_vision_model_it_reads_and_where_that_is(tmp_path, kind, width, found):
    adapter = load_ip_adapter(written(tmp_path, random_file(kind, [BlockShape(320, 768)], 768, width)))
    assert re.search(rf"{found}.* {width} wide", vision_model(adapter.projector))
