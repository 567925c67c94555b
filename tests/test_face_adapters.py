"""FaceID files, read and applied as diffusers does it: random weights in the layout of the published files."""

import copy

import pytest
import torch
from adapter_runs import photo_run
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from face_pictures import embedding
from ip_adapter_files import FACES, random_file
from sdxl import TINY, added_conditions, sdxl_unet

from moa_core.adapters.image_expert import file_order
from moa_core.adapters.ip_adapter_file import IPAdapterFileError, load_ip_adapter
from moa_core.address import block_shapes
from moa_core.subjects.binding import Binding
from moa_core.subjects.face_crop import POINTS, face_crop
from moa_core.subjects.face_points import draw_face_points
from moa_core.subjects.rows import Row
from moa_core.subjects.subject import EncoderId, Subject, interpolate
from moa_core.subjects.view import View
from tests.test_ip_adapter import diffusers_dict, pictures, written
from training.host.adapter import MoAUNet
from training.host.prior import prior_of

NAMES = {kind: f"ip-adapter-{kind}" for kind in FACES} | {
    "portrait": "ip-adapter-faceid-portrait-v11",
    "unnorm": "ip-adapter-faceid-portrait_sdxl_unnorm",
}


def faces(kind: str, count: int) -> torch.Tensor:
    """[P, 512], of that many photos."""
    found = torch.stack([torch.tensor(embedding(who)) for who in range(count)])
    return found if kind == "unnorm" else found / found.norm(dim=-1, keepdim=True)


@pytest.fixture(scope="module")
def unets(toy_base):
    """The toy U-Net, SD 1.5's and SDXL's at a tenth of their width."""
    torch.manual_seed(0)
    width = toy_base.unet.config.cross_attention_dim
    sd15 = UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64, 128, 128), cross_attention_dim=width, norm_num_groups=8
    )
    return {"toy": copy.deepcopy(toy_base.unet), "SD 1.5": sd15.eval(), "SDXL": sdxl_unet(**TINY)}


@pytest.mark.parametrize(
    ("family", "kind", "photos", "weight"),
    [
        *(("toy", kind, *others) for kind in NAMES for others in ((1, 1.0), (2, 0.6))),
        ("SD 1.5", "faceid-plusv2", 1, 1.0),
        ("SDXL", "faceid", 1, 1.0),
    ],
)
@torch.no_grad()
def test_with_a_share_of_1_everywhere_it_is_the_faceid_of_diffusers(tmp_path, unets, family, kind, photos, weight):
    """A positive and a negative row; the weight is that of the image tokens and that of the LoRA."""
    unet = unets[family]
    blocks, width = block_shapes(unet.state_dict()), unet.config.cross_attention_dim
    weights = random_file(kind, [blocks[a] for a in file_order(blocks)], width)
    adapter = load_ip_adapter(written(tmp_path, weights, f"{NAMES[kind]}.safetensors"))
    assert adapter.family == ("SDXL" if family == "SDXL" else "SD 1.5")
    person = faces(kind, photos)
    seen = pictures("plus", photos + 1) if "plus" in kind else None
    theirs = of_diffusers(unet, weights, weight)
    embeds = torch.stack([person, torch.zeros_like(person)])  # [2, P, 512]
    embeds = embeds[:, :, None] if kind == "unnorm" else embeds  # a Resampler reads a row of tokens
    if seen is not None:
        projection = theirs.encoder_hid_proj.image_projection_layers[0]
        projection.clip_embeds = torch.stack([seen[:photos], seen[photos:].expand(photos, -1, -1)])
        projection.shortcut = kind == "faceid-plusv2"

    random = torch.Generator().manual_seed(1)
    latents, context = torch.randn(2, 4, 16, 16, generator=random), torch.randn(2, 77, width, generator=random)
    timestep, added = torch.tensor([500.0, 500.0]), added_conditions(2) if family == "SDXL" else {}
    expected = theirs(latents, timestep, context, added_cond_kwargs={"image_embeds": [embeds], **added}).sample
    prior = unet(latents, timestep, context, added_cond_kwargs=added).sample

    grids = ([], []) if seen is None else ([seen[:photos]], [seen[photos:]])
    adapter.mixture.negative = adapter.projector(torch.zeros(1, 512), *grids[1])[0]
    tokens = adapter.projector(person, *grids[0])
    subject = Subject(tokens.flatten()[None], "man", "man", weight, area=torch.ones(1, 16, 16))
    rows = [Row(View(0), (Binding(3, subject),), 77, True), Row(View(0), (), 77, False)]
    call = photo_run(unet, {subject: adapter}).call(rows, 500.0, latents, context, timestep, prior_of(unet))
    ours = MoAUNet(copy.deepcopy(unet), None).run(latents, timestep, context, call, added_cond_kwargs=added)

    effect = (expected - prior).abs().max()
    difference = ((ours - expected).abs().max() / effect).item()
    print(f"{kind}, {photos} photos at {weight}: max abs difference {difference:.1e} of the effect {effect:.2f}")
    assert effect > 0.1 and difference < 1e-5


def of_diffusers(unet, weights: dict[str, torch.Tensor], weight: float) -> UNet2DConditionModel:
    """A copy of a U-Net with the file, by load_ip_adapter of a pipeline that has nothing else."""
    kind = StableDiffusionXLPipeline if unet.config.addition_embed_type else StableDiffusionPipeline
    parts = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"))
    if kind is StableDiffusionPipeline:
        parts = {n: None for n in parts if not n.endswith("_2")} | {"safety_checker": None, "feature_extractor": None}
    pipeline = kind(unet=copy.deepcopy(unet), **parts)
    pipeline.load_ip_adapter(diffusers_dict(weights), None, None, image_encoder_folder=None)
    pipeline.set_ip_adapter_scale(weight)
    if any("lora" in name for name in weights):
        pipeline.unet.set_adapters(["faceid_0"], [weight])
    return pipeline.unet


@torch.no_grad()
def test_two_people_of_one_file_share_its_lora_and_each_reads_their_own_photos(tmp_path, unets):
    """Two photos of one, one of the other: over both halves it is the same as each in a file of their own."""
    unet = unets["toy"]
    blocks, width = block_shapes(unet.state_dict()), unet.config.cross_attention_dim
    path = written(
        tmp_path, random_file("faceid", [blocks[a] for a in file_order(blocks)], width), "faceid.safetensors"
    )
    left, right = torch.zeros(1, 16, 16), torch.zeros(1, 16, 16)
    left[..., :8], right[..., 8:] = 1, 1
    random = torch.Generator().manual_seed(1)
    latents, context = torch.randn(1, 4, 16, 16, generator=random), torch.randn(1, 77, width, generator=random)
    drawn = []
    for files in ([load_ip_adapter(path)] * 2, [load_ip_adapter(path), load_ip_adapter(path)]):
        everyone = {}
        for adapter, area, photos in zip(
            files, (left, right), (faces("faceid", 2), faces("faceid", 3)[2:]), strict=True
        ):
            adapter.mixture.negative = adapter.projector(torch.zeros(1, 512))[0]
            features = adapter.projector(photos).flatten()[None]
            everyone[Subject(features, "man", "man", 0.5 + len(photos) / 4, area)] = adapter
        run = photo_run(unet, everyone)
        assert run.adapters.adapters.deltas.parts == len(set(map(id, files)))
        row = Row(View(0), tuple(Binding(n, subject) for n, subject in enumerate(everyone)), 77, True)
        call = run.call([row], 500.0, latents, context, torch.tensor([500.0]), prior_of(unet))
        drawn.append(MoAUNet(copy.deepcopy(unet), None).run(latents, torch.tensor([500.0]), context, call))
    torch.testing.assert_close(*drawn, atol=1e-4, rtol=1e-4)
    plain = unet(latents, torch.tensor([500.0]), context).sample
    assert (drawn[0] - plain).abs().amax(dim=(0, 1, 2)).min() > 1e-2


@torch.no_grad()
def test_a_files_lora_changes_only_what_is_on_the_person(tmp_path, unets):
    unet = unets["toy"]
    blocks, width = block_shapes(unet.state_dict()), unet.config.cross_attention_dim
    weights = random_file("faceid", [blocks[a] for a in file_order(blocks)], width)
    adapter = load_ip_adapter(written(tmp_path, weights, "faceid.safetensors"))
    left = torch.zeros(1, 16, 16)
    left[..., :5] = 1
    person = Subject(adapter.projector(faces("faceid", 1)).flatten(1), "man", "man", area=left)
    row = Row(View(0), (Binding(3, person),), 77, True)
    latents, context = torch.zeros(1, 4, 16, 16), torch.zeros(1, 77, width)
    call = photo_run(unet, {person: adapter}).call([row], 500.0, latents, context, torch.tensor([5.0]), prior_of(unet))
    address = file_order(blocks)[0]
    for layer, number in (("attn1.to_q", 0), ("attn2.to_out.0", 1)):
        name = f"{address.to_diffusers(unet.config.layers_per_block)}.{layer}"
        x = torch.randn(1, 256, blocks[address].dim)
        out = unet.get_submodule(name)(x)
        changed = call.changed(name, x, out, (16, 16)).unflatten(1, (16, 16))
        lora = f"ip_adapter.{number}.{layer.split('.')[1]}_lora"
        delta = x @ (weights[f"{lora}.up.weight"] @ weights[f"{lora}.down.weight"]).T
        assert torch.equal(changed[:, :, 5:], out.unflatten(1, (16, 16))[:, :, 5:])
        torch.testing.assert_close(changed[:, :, :5], (out + delta).unflatten(1, (16, 16))[:, :, :5])


def test_subjects_of_one_and_of_two_photos_blend_and_their_ends_are_themselves():
    encoder = EncoderId("faces", "faceid")
    one, two = (Subject(torch.randn(1, 8 * n), "man", "man", encoder=encoder) for n in (1, 2))
    morph = interpolate(one, two, 0.0, frames=3)
    assert torch.equal(morph.features[0], one.features[0].repeat(2)) and torch.equal(morph.features[2], two.features[0])
    stranger = Subject(torch.randn(1, 12), "man", "man", encoder=EncoderId("others", "other"))
    with pytest.raises(ValueError, match="another image encoder"):
        interpolate(one, stranger, 0.5)


@pytest.mark.parametrize(
    ("kind", "name", "found"),
    [
        ("faceid-plus", "adapter", "version 1 or 2.*'faceid-plus'.*'faceid-plusv2'"),
        ("unnorm", "adapter", "which.*'portrait'.*'instantid'"),
        ("faceid", "ip-adapter-faceid", "0.to_k_lora.down.weight is"),
        ("portrait", "ip-adapter-faceid-portrait", "0.to_k_lora"),
    ],
)
def test_a_file_whose_name_or_lora_says_too_little_is_refused_in_a_sentence(tmp_path, unets, kind, name, found):
    blocks = block_shapes(unets["toy"].state_dict())
    weights = random_file(kind, [blocks[a] for a in file_order(blocks)], 64)
    if name != "adapter":
        weights["ip_adapter.0.to_k_lora.down.weight"] = torch.zeros(8, 7)
    with pytest.raises(IPAdapterFileError, match=f"{name}.*{found}"):
        load_ip_adapter(written(tmp_path, weights, f"{name}.safetensors"))


@pytest.mark.parametrize(
    ("name", "faces"), [("ip-adapter-faceid-portrait_sdxl_unnorm", "buffalo_l"), ("InstantID", "antelopev2")]
)
def test_the_name_says_whose_faces_an_unnormalized_file_reads(tmp_path, unets, name, faces):
    """InstantID's adapter has the layout of FaceID portrait unnorm, and the faces of other models."""
    blocks = block_shapes(unets["toy"].state_dict())
    weights = random_file("unnorm", [blocks[a] for a in file_order(blocks)], 64)
    adapter = load_ip_adapter(written(tmp_path, weights, f"{name}.safetensors"))
    assert adapter.faces == faces and adapter.projector.face == "embedding"


@pytest.mark.parametrize(("name", "is_v2"), [("ip-adapter-faceid-plusv2_sd15", True), ("FaceID_Plus_V2", True),
                                             ("ip-adapter-faceid-plus_sd15", False)])  # fmt: skip
def test_the_name_says_which_version_a_plus_file_is(tmp_path, unets, name, is_v2):
    blocks = block_shapes(unets["toy"].state_dict())
    weights = random_file("faceid-plus", [blocks[a] for a in file_order(blocks)], 64)
    assert load_ip_adapter(written(tmp_path, weights, f"{name}.safetensors")).projector.is_v2 is is_v2


def test_a_face_is_cut_out_upright_and_always_of_one_size():
    """A picture that says of each pixel where it is, seen turned and larger, with one point marked less exactly."""
    rows, columns = torch.meshgrid(torch.arange(400.0), torch.arange(500.0), indexing="ij")
    picture = torch.stack([columns / 500, rows / 400, torch.zeros_like(rows)], dim=-1)
    wanted = torch.tensor(POINTS) * 2
    angle, scale = 0.4, 0.8
    turn = scale * torch.tensor([[torch.tensor(angle).cos(), -torch.tensor(angle).sin()],
                                 [torch.tensor(angle).sin(), torch.tensor(angle).cos()]])  # fmt: skip
    points = wanted @ turn.T + torch.tensor([150.0, 60.0])
    crop = face_crop(picture, points)
    assert crop.shape == (224, 224, 3)
    at = crop[[103, 143], [76, 112], :2] * torch.tensor([500, 400])
    expected = torch.tensor([[76.0, 103.0], [112.0, 143.0]]) @ turn.T + torch.tensor([150.0, 60.0])
    torch.testing.assert_close(at, expected, atol=0.1, rtol=0)
    apart = torch.tensor([[5.0, 0], [0, 3], [-4, 0], [0, 0], [2, -6]])
    fitted = torch.linalg.lstsq(similarity(points + apart), wanted.flatten()).solution  # as insightface fits it
    moved = face_crop(picture, points + apart)
    middle = moved[112, 112, :2] * torch.tensor([500, 400])
    assert (similarity(middle[None]) @ fitted - 112).abs().max() < 0.2


def test_face_points_are_discs_each_tied_to_the_nose_on_black():
    """In a drawing whose longer side is 1280: discs 10 wide round each, ties 8 across their middle and dimmer."""
    points = torch.tensor([[100.0, 50.0], [300.0, 60.0], [200.0, 150.0], [120.0, 240.0], [280.0, 245.0]])
    drawn = draw_face_points(points, (320, 640))
    assert drawn.shape == (640, 1280, 3)
    colors = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1]])
    for point, color in zip(points * 2, colors, strict=True):
        for x, y in ((0, 0), (9, 0), (0, -9), (6, 6)):
            assert torch.equal(drawn[int(point[1]) + y, int(point[0]) + x], color)
    for n in (0, 1, 3, 4):
        tie = points[2] * 2 - points[n] * 2
        middle, across = points[n] + points[2], torch.stack([-tie[1], tie[0]]) / tie.norm()
        for off, wanted in ((0.0, 0.6), (3.0, 0.6), (-3.0, 0.6), (5.0, 0.0), (-5.0, 0.0)):
            x, y = (middle + off * across).round().long()
            torch.testing.assert_close(drawn[y, x], wanted * colors[n])
    ties = sum(3.14159 * (points[n] - points[2]).norm() * 4 for n in (0, 1, 3, 4))
    assert 5 * 314 < (drawn.amax(dim=-1) > 0).sum() < 5 * 330 + ties


def similarity(points: torch.Tensor) -> torch.Tensor:
    """[2N, 4]: times (a, b, x, y) it gives the points turned by a + bi and moved by (x, y)."""
    x, y, one, none = points[:, 0], points[:, 1], torch.ones(len(points)), torch.zeros(len(points))
    return torch.stack([torch.stack([x, -y, one, none], 1), torch.stack([y, x, none, one], 1)], 1).flatten(0, 1)
