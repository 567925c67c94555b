"""Bad input: a sentence that names the thing, what was expected, what was found and what to do."""

import dataclasses
import json
import logging

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def rewrite(host, name, change_metadata=lambda m: None, change_weights=lambda w: None):
    """A changed copy of the stirred MoA file; its name."""
    source = host.base / "models/moa/moa-stirred.safetensors"
    with safe_open(source, "pt") as file:
        metadata = dict(file.metadata())
    weights = load_file(source)
    change_metadata(metadata)
    change_weights(weights)
    save_file(weights, host.base / "models/moa" / name, metadata)
    return name


def refused(host, name):
    """The sentence with which MoA Loader refuses a file."""
    with pytest.raises(ValueError) as error:
        host.run("MoALoader", name)
    sentence = str(error.value)
    assert name in sentence
    return sentence


def test_a_file_that_is_no_moa_file(host):
    save_file({"weight": torch.zeros(3)}, host.base / "models/moa/lora.safetensors")
    sentence = refused(host, "lora.safetensors")
    assert "no MoA file" in sentence and "'moa'" in sentence


def test_a_truncated_file_and_one_of_text(host):
    whole = (host.base / "models/moa/moa-stirred.safetensors").read_bytes()
    for name, content in (
        ("cut.safetensors", whole[:-1000]),
        ("head.safetensors", whole[:5]),
        ("page.safetensors", b"<html>" * 99),
    ):
        (host.base / "models/moa" / name).write_bytes(content)
        sentence = refused(host, name)
        assert "damaged" in sentence and f"{len(content):,} bytes" in sentence and "download" in sentence


def test_an_unknown_format_version(host):
    name = rewrite(host, "future.safetensors", lambda m: m.update(format_version="7"))
    sentence = refused(host, name)
    assert "'7'" in sentence and "'1'" in sentence and "Update" in sentence


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda m: m.update(config="{"), "configuration"),
        (lambda m: m.update(config=json.dumps({"base": "x"})), "blocks"),
        (lambda m: m.update(config=json.dumps({**json.loads(m["config"]), "colour": 3})), "colour"),
        (
            lambda m: m.update(config=json.dumps({**json.loads(m["config"]), "image_encoder": {"image_size": 64}})),
            "projection_dim",
        ),
        (lambda m: m.update(config=json.dumps({**json.loads(m["config"]), "heads": 0})), "heads"),
    ],
)
def test_a_damaged_configuration(host, change, found):
    assert found in refused(host, rewrite(host, "config.safetensors", change))


def test_weights_missing_left_over_or_of_another_shape(host):
    key = "mixture.layers.input_1_0_attn1.expert.to_q.weight"
    for change, found in (
        (lambda w: w.pop(key), "is missing"),
        (lambda w: w.update(extra=torch.zeros(1)), "extra is unknown"),
        (lambda w: w.update({key: torch.zeros(3, 3)}), "[3, 3], expected [64, 64]"),
    ):
        assert found in refused(host, rewrite(host, "weights.safetensors", change_weights=change))


def test_a_moa_for_another_base_names_both(host, loaded, moa):
    import comfy.sd
    from diffusers import UNet2DConditionModel

    from training.host.ldm_names import unet_to_ldm

    with torch.inference_mode(False):
        wide = UNet2DConditionModel(
            block_out_channels=(64, 256),
            layers_per_block=1,
            attention_head_dim=2,
            cross_attention_dim=64,
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
        )
    weights = {f"model.diffusion_model.{k}": v for k, v in unet_to_ldm(wide.state_dict(), 1).items()}
    model = comfy.sd.load_diffusion_model_state_dict(weights)
    with pytest.raises(ValueError, match="moa-stirred.*MoA toy.*64/128 wide.*this MODEL is.*64/256 wide"):
        host.patch(model, loaded[1], moa)


@pytest.mark.parametrize("family", ["SDXL", "Flux"])
def test_a_model_of_another_family(host, loaded, moa, family):
    """The families' real classes, as large as they are, without memory for weights."""
    import comfy.supported_models
    from comfy.ldm.flux.model import FluxParams
    from comfy.model_patcher import ModelPatcher

    config_class = getattr(comfy.supported_models, family)
    unet_configs = {
        "SDXL": {
            "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2],
            "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10], "transformer_depth_middle": 10,
            "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "context_dim": 2048, "num_heads": -1,
            "use_spatial_transformer": True, "use_linear_in_transformer": True, "adm_in_channels": 2816,
            "num_classes": "sequential", "num_head_channels": 64, "legacy": False,
        },
        "Flux": {
            "image_model": "flux", "in_channels": 16, "patch_size": 2, "out_channels": 16, "vec_in_dim": 768,
            "context_in_dim": 4096, "hidden_size": 256, "mlp_ratio": 4.0, "num_heads": 2, "depth": 1,
            "depth_single_blocks": 1, "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True,
            "guidance_embed": True,
        },
    }  # fmt: skip
    if family == "Flux" and any(f.name == "txt_ids_dims" for f in dataclasses.fields(FluxParams)):
        unet_configs["Flux"]["txt_ids_dims"] = []
    config = config_class(unet_configs[family])
    config.set_inference_dtype(torch.float16, None)
    model = config.get_model({}, device="meta")
    patcher = ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
    with pytest.raises(ValueError, match=f"moa-stirred.*MoA toy.*this MODEL is {family}.*Load a checkpoint of MoA toy"):
        host.patch(patcher, loaded[1], moa)


def test_two_moas_on_one_model(host, loaded, moa):
    model, clip, _ = loaded
    patched, patched_clip = host.patch(model, clip, moa, host.subject(moa))
    with pytest.raises(ValueError, match="already has a MoA.*up to 8 subjects"):
        host.patch(host.run("FreeU_V2", patched, 1.3, 1.4, 0.9, 0.2)[0], patched_clip, moa, host.subject(moa))


@pytest.mark.parametrize("word", ["", "   "])
def test_an_empty_word(host, moa, word):
    with pytest.raises(ValueError, match="'word' is empty"):
        host.subject(moa, word=word)


def test_no_subject_is_told(host, loaded, moa, caplog):
    host.patch(loaded[0], loaded[1], moa)
    assert "No subject is connected" in caplog.text


def test_a_word_that_the_tokenizer_does_not_see(host, loaded, moa):
    model, clip, _ = loaded
    with pytest.raises(ValueError, match="word 'embedding:none' .* no token"):
        host.patch(model, clip, moa, host.subject(moa, word="embedding:none"))


def warnings_of_sampling(host, loaded, moa, caplog, prompt, *subjects, clip=None):
    model, plain, _ = loaded
    patched, bound_clip = host.patch(model, plain, moa, *subjects)
    positive, negative = host.prompt(clip or bound_clip, prompt), host.prompt(bound_clip, "a man")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        host.sample(patched, positive, negative)
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("MoA")]


def test_a_subject_whose_word_is_not_in_the_prompt(host, loaded, moa, caplog):
    (sentence,) = warnings_of_sampling(host, loaded, moa, caplog, "a house in paris", host.subject(moa))
    assert "'a house in paris'" in sentence and "'man'" in sentence and "subject0" in sentence


def test_more_subjects_than_occurrences(host, loaded, moa, caplog):
    subjects = [host.subject(moa, 1), host.subject(moa, 2)]
    (sentence,) = warnings_of_sampling(host, loaded, moa, caplog, "a man in paris", *subjects)
    assert "subject1" in sentence and "2 times" in sentence and "'man'" in sentence
    assert "a detailer's for each face" in sentence and "different words" in sentence


def test_a_prompt_from_another_clip(host, loaded, moa, caplog):
    (sentence,) = warnings_of_sampling(host, loaded, moa, caplog, "a man", host.subject(moa), clip=loaded[1])
    assert "MoA Patch Model's CLIP" in sentence


def test_no_warning_when_every_subject_finds_its_word(host, loaded, moa, caplog):
    assert not warnings_of_sampling(
        host, loaded, moa, caplog, "a man and a man", host.subject(moa, 1), host.subject(moa, 2)
    )


def encode(host, moa, image, mask=None):
    return host.run("MoASubjectEncoder", moa, image, "man", mask)[0].features


def test_an_image_with_alpha_uses_it_as_its_mask(host, moa, caplog):
    picture = torch.rand(1, 80, 80, 3)
    mask = torch.zeros(1, 80, 80)
    mask[:, 20:60, 30:70] = 1.0
    with caplog.at_level(logging.INFO):
        with_alpha = encode(host, moa, torch.cat([picture, mask[..., None]], dim=-1))
    assert torch.equal(with_alpha, encode(host, moa, picture, mask))
    assert not torch.equal(with_alpha, encode(host, moa, picture))
    assert any("alpha" in r.getMessage() for r in caplog.records)


def test_an_image_of_one_pixel(host, moa):
    with pytest.raises(ValueError, match="1x1 pixels; at least 16x16"):
        encode(host, moa, torch.rand(1, 1, 1, 3))


def test_an_image_of_8000_pixels_says_what_its_small_copy_says(host, moa):
    small = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    large = small.repeat_interleave(125, 1).repeat_interleave(125, 2)
    assert large.shape[1:3] == (8000, 8000)
    a, b = encode(host, moa, large), encode(host, moa, small)
    assert torch.cosine_similarity(a, b).item() > 0.98


def test_a_batch_of_64_is_one_subject(host, moa):
    pictures = torch.rand(64, 64, 64, 3)
    features = encode(host, moa, pictures)
    single = torch.cat([encode(host, moa, p[None]) for p in pictures])
    assert features.shape == (1, 64)
    assert torch.allclose(features, single.mean(dim=0, keepdim=True), atol=1e-5)


def test_masks_of_another_size_count_or_all_black(host, moa):
    mask = torch.zeros(1, 80, 80)
    mask[:, 20:60, 20:60] = 1.0
    picture = torch.stack([mask, 1 - mask, mask * 0], dim=-1).expand(2, -1, -1, -1)  # red before green
    small, whole = encode(host, moa, picture, mask[:, ::2, ::2]), encode(host, moa, picture, mask)
    assert (small - whole).norm() < 0.2 * (small - encode(host, moa, picture)).norm()
    assert torch.equal(encode(host, moa, picture, torch.zeros(1, 64, 64)), encode(host, moa, picture))
    with pytest.raises(ValueError, match="3 masks for 2 pictures"):
        encode(host, moa, picture, mask.expand(3, -1, -1))


def test_a_mask_of_the_background_is_doubted_and_one_of_the_person_is_not(host, moa, caplog):
    image, mask = host.run("MoAToySubject", 3, "standing", "man")
    close_up = torch.ones_like(mask)
    close_up[:, :40, :10] = 0.0
    for connected, doubted in ((mask, False), (1 - mask, True), (close_up, False), (torch.ones_like(mask), False)):
        caplog.clear()
        encode(host, moa, image, connected)
        assert any("InvertMask" in r.getMessage() or "background" in r.getMessage() for r in caplog.records) == doubted


def test_a_mask_of_another_size_is_told_unless_it_is_of_one_colour(host, moa, caplog):
    image, mask = host.run("MoAToySubject", 3, "standing", "man")
    half, whole = mask.shape[1] // 2, mask.shape[1]
    for connected, told in ((mask[:, ::2, ::2], True), (torch.ones(1, half, half), False), (mask, False)):
        caplog.clear()
        encode(host, moa, image, connected)
        said = f"mask is {half}x{half}, the picture {whole}x{whole}"
        assert any(said in r.getMessage() for r in caplog.records) == told


def test_the_prepared_reference_is_what_the_node_shows(host, moa):
    """With its mask the person on grey; without, the whole picture."""
    from PIL import Image

    image, mask = host.run("MoAToySubject", 3, "standing", "man")
    encoder = host.nodes["MoASubjectEncoder"]
    shown = []
    for connected in (mask, None, 1 - mask):
        (file,) = encoder.execute(moa, image * 0.5, "man", connected).ui.as_dict()["images"]
        shown.append(np.asarray(Image.open(host.base / "temp" / file["filename"])).astype(int))
    person, whole, background = shown
    grey = np.array([123, 117, 104])
    assert whole.shape == (64, 64, 3)
    assert abs(person[:3, :3] - grey).max() <= 2 and abs(whole[:3, :3] - grey).max() > 20
    assert abs(background[40:, 28:36] - grey).max() <= 8


def test_nan_in_features(host, moa):
    picture = torch.rand(1, 64, 64, 3)
    picture[0, 5, 5] = float("nan")
    with pytest.raises(ValueError, match="'man' hold NaN.*moa-stirred"):
        encode(host, moa, picture)
    key = "image_encoder.model.visual_projection.weight"
    name = rewrite(host, "nan.safetensors", change_weights=lambda w: w[key].fill_(float("nan")))
    with pytest.raises(ValueError, match=r"nan\.safetensors.*no number"):
        host.run("MoALoader", name)


def test_subjects_that_do_not_fit(host, loaded, moa):
    subject = host.subject(moa)
    other = type(subject)(torch.zeros(1, 32), "man", "man")
    with pytest.raises(ValueError, match="width 32.*reads 64"):
        host.patch(loaded[0], loaded[1], moa, other)
    with pytest.raises(ValueError, match="width 64.*32"):
        host.run("MoASubjectInterpolate", subject, other, 0.5, 1, "linear")


def test_the_visualizer_without_a_moa_or_without_a_run(host, loaded, moa, caplog):
    samples = {"samples": torch.zeros(1, 4, 16, 16)}
    with pytest.raises(ValueError, match="has no MoA at work"):
        host.run("MoARouterVisualizer", loaded[0], samples)
    patched, _ = host.patch(loaded[0], loaded[1], moa)
    samples = {"samples": torch.zeros(1, 4, 11, 13)}
    image, area, masks = host.run("MoARouterVisualizer", patched, samples)  # the rest of the graph goes on
    assert image.shape[0] == 1 and area.shape == masks.shape == (1, 88, 104) and not area.any() and not masks.any()
    assert "No maps are known for these latents" in caplog.text and "change the KSampler's seed" in caplog.text


@pytest.mark.parametrize("connected", ["mask", "area"])
def test_masks_of_four_dimensions_are_what_they_are(host, loaded, each_moa, connected):
    """Some nodes hand out [B, 1, H, W], others [B, H, W, 1]; a picture is refused in a sentence."""
    mask = torch.zeros(1, 80, 80)
    mask[:, 20:60, 20:60] = 1.0
    if each_moa is None:
        if connected == "mask":
            return  # a LoRA subject has none

        def made(m):
            return host.run("MoALoRASubject", "random-0.safetensors", "man", area=m)[0].area
    else:
        picture = torch.rand(1, 80, 80, 3, generator=torch.Generator().manual_seed(1))

        def made(m):
            subject = host.run("MoASubjectEncoder", each_moa, picture, "man", **{connected: m})[0]
            return subject.features if connected == "mask" else subject.area

    assert torch.equal(made(mask[:, None]), made(mask)) and torch.equal(made(mask[..., None]), made(mask))
    with pytest.raises(ValueError, match=rf"'{connected}' has the shape \[1, 80, 80, 3\].*Connect a mask"):
        made(mask[..., None].expand(-1, -1, -1, 3))


def test_numbers_are_the_sockets_where_one_between_is_muted(host, loaded, each_moa, caplog):
    model, clip, _ = loaded
    first, third = host.subject(each_moa, 1), host.subject(each_moa, 2, "woman")
    patched, bound_clip = host.run("MoAPatchModel", model, clip, each_moa, {"subject0": first, "subject2": third})
    negative = host.prompt(bound_clip, "bad")
    host.sample(patched, host.prompt(bound_clip, "a man in paris"), negative)
    assert "subject2 will not appear: no 'woman'" in caplog.text and "subject1" not in caplog.text
    drawn = host.sample(patched, host.prompt(bound_clip, "a man and a woman in paris"), negative)
    masks = host.run("MoARouterVisualizer", patched, drawn)[2]
    assert len(masks) == 3 and not masks[1].any() and masks[0].any() and masks[2].any()


def test_a_tall_photo_without_a_mask_is_doubted_where_its_middle_alone_is_encoded(host, moa, ip_moa, caplog):
    tall, mask = torch.rand(1, 90, 60, 3), torch.zeros(1, 90, 60)
    mask[:, 10:80, 10:50] = 1.0
    for which, image, own_mask, doubted in (
        (ip_moa, tall, None, True),
        (ip_moa, tall, torch.zeros(1, 64, 64), True),  # as Load Image hands out where nothing is transparent
        (ip_moa, tall, mask, False),
        (ip_moa, tall[:, :60], None, False),
        (moa, tall, None, False),  # encodes all of it
    ):
        caplog.clear()
        encode(host, which, image, own_mask)
        assert ("60x90" in caplog.text and "head may be cut off" in caplog.text) == doubted
