"""MoA From IP-Adapter in a real ComfyUI: from the file and the photo to the picture."""

import copy
from functools import partial

import pytest
import torch
from adapter_runs import image_run
from conftest import unsaturated
from image_experts import PROMPT, adapter, patched, picture, vision
from ip_adapter_files import random_file
from narrow_sdxl import narrow_model
from safetensors.torch import save_file
from sdxl import TINY, added_conditions, sdxl_unet
from test_parity import calls

from toy_world.shape import IMAGE_SIZE


def outside(moa):
    """The image experts of a MOA as they are without the host."""
    from moa_core.adapters.image_expert import ImageMixture

    inside = moa.adapter.mixture
    mixture = ImageMixture(inside.shapes, inside.tokens)
    mixture.load_state_dict(inside.state_dict())
    mixture.negative = inside.negative
    return mixture


@pytest.mark.parametrize("kind", ["base", "plus", "full-face"])
def test_every_kind_of_file_changes_the_picture_after_the_beginning_and_each_person_counts(
    host, loaded, toy_base, tmp_path, kind
):
    moa = adapter(host, toy_base.unet, tmp_path, kind)
    plain = host.sample(loaded[0], host.prompt(loaded[1], PROMPT), host.prompt(loaded[1], "ugly"), steps=5)["samples"]
    drawn = [
        host.sample(*patched(host, loaded, moa, *words), steps=5)["samples"] for words in (("man",), ("man", "woman"))
    ]
    assert (drawn[0] - plain).abs().max() > 1e-2 and (drawn[1] - drawn[0]).abs().max() > 1e-2


def test_strength_0_weight_0_and_unbound_prompts_change_not_one_bit(host, loaded, ip_moa):
    model, clip, _ = loaded

    def plain(prompt: str, steps: int):
        return host.sample(model, host.prompt(clip, prompt), host.prompt(clip, "ugly"), steps=steps)["samples"]

    for steps, prompt, options in (
        (3, PROMPT, {"widgets": {"strength": 0.0}}),
        (3, PROMPT, {"weight": 0.0}),
        (3, "a house in paris", {}),
    ):
        drawn = host.sample(*patched(host, loaded, ip_moa, "man", prompt=prompt, **options), steps=steps)["samples"]
        assert torch.equal(drawn, plain(prompt, steps))
    drawn = host.sample(*patched(host, loaded, ip_moa, "man"), steps=1)["samples"]  # as one-step checkpoints do
    assert (drawn - plain(PROMPT, 1)).abs().max() > 1e-2


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_rows_batched_or_split_give_the_same(host, loaded, ip_moa, monkeypatch, sampler):
    model, positive, negative = patched(host, loaded, ip_moa, "man", "woman")
    together = host.sample(model, positive, negative, batch=2, steps=4, sampler=sampler)["samples"]
    monkeypatch.setattr(type(model.model), "memory_required", lambda *a, **k: 1e30)
    apart = host.sample(model, positive, negative, batch=2, steps=4, sampler=sampler)["samples"]
    assert (together - apart).abs().max() < 1e-4 * together.abs().max()


def test_an_area_holds_from_the_first_step_on_and_leaves_the_rest_to_the_checkpoint(host, loaded, ip_moa):
    left = torch.zeros(1, 128, 128)
    left[..., :40] = 1
    model, positive, negative = patched(host, loaded, ip_moa, "man", area=left)
    drawn = host.sample(model, positive, negative, steps=1)["samples"]
    shares = model.get_attachment("moa").runs[-1].trace.subject_area()[0]
    assert (shares[:, :3] > 0.99).all() and not shares[:, 7:].any()
    assert not torch.allclose(drawn, host.sample(loaded[0], positive, negative, steps=1)["samples"], atol=1e-2)


@pytest.mark.parametrize("family", ["SD 1.5", "SDXL"])
def test_comfyui_and_diffusers_agree_on_words_shares_and_pictures(host, loaded, toy_base, tmp_path, family):
    """After scouting, three noise levels in one run, each routed by what the ones before have shown."""
    from moa_core.address import block_shapes
    from moa_core.subjects.binding import Binding
    from moa_core.subjects.rows import Row
    from moa_core.subjects.subject import Subject
    from moa_core.subjects.view import View
    from training.host.adapter import MoAUNet
    from training.host.prior import prior_of
    from training.host.scouting import scout

    torch.manual_seed(0)
    with torch.inference_mode(False):
        unet = copy.deepcopy(toy_base.unet) if family == "SD 1.5" else sdxl_unet(**TINY)
    ip_moa = adapter(host, unet, tmp_path, "plus")
    assert ip_moa.base == family
    model, others, added = loaded[0].clone(), {}, {}
    if family == "SDXL":
        model, added = narrow_model(unet), added_conditions(1)
        others = {"pooled_output": added["text_embeds"], "height": 1024, "width": 768}
        added = {name: value.expand(2, -1) for name, value in added.items()}
    timesteps = torch.tensor([700.0, 500.0, 300.0])
    inputs, context = torch.randn(3, 2, 4, 16, 16), torch.randn(1, 77, unet.config.cross_attention_dim)
    mixture, ours_mixture = ip_moa.adapter.mixture, outside(ip_moa)
    people = [Subject(torch.randn(1, mixture.feature_dim), word, word) for word in ("man", "woman")]

    binding = host.module("moa_core.subjects.binding")
    bound = tuple(binding.Binding(place, person) for place, person in zip((5, 60), people, strict=True))
    conditioning = [[context, {"moa_bound_prompt": binding.BoundPrompt("a man and a woman", bound), **others}]]
    sigmas = model.get_model_object("model_sampling").sigma(timesteps)
    adapters = host.module("moa_core.adapters.run").Adapters(dict.fromkeys(people, mixture), {})
    hooks = host.module("nodes.sampling.sampling_run").MoAHooks(people, adapters=adapters)
    hooks.attach(model, ip_moa.mixture.clone())
    theirs = calls(model, conditioning, inputs, sigmas)

    blocks = block_shapes(unet.state_dict())
    run = image_run(ours_mixture, people, blocks, pictures=2)
    wrapped = MoAUNet(unet, None)
    rows = [Row(View(n), tuple(Binding(b.position, b.subject) for b in bound), 77, True) for n in range(2)]
    contexts = context.expand(2, -1, -1)
    wrapped_call = partial(run.call, rows, context=contexts, prior=prior_of(unet))

    def predict(latents, now):
        timestep = torch.tensor([float(now)] * 2)
        call = wrapped_call(level=float(now), latents=latents, timestep=timestep)
        noise = wrapped.run(latents, timestep, contexts, call, added_cond_kwargs=added)
        run.finish(call, rows, latents)
        return noise

    scout(run, predict, torch.zeros_like(inputs[0]), 700)
    effects = []
    for x, timestep, their in zip(inputs, timesteps, theirs, strict=True):
        call = wrapped_call(level=float(timestep), latents=x, timestep=timestep.expand(2))
        our = wrapped.run(x, timestep.expand(2), contexts, call, added_cond_kwargs=added)
        run.finish(call, rows, x)
        prior = wrapped.run(x, timestep.expand(2), contexts, None, added_cond_kwargs=added)
        effects.append((our - prior).abs().max().item())
        difference = (our - their).abs().max().item()
        print(f"at {timestep:.0f}: max abs difference {difference:.1e} of the effect {effects[-1]:.2f}")
        assert difference < 1e-4
    assert min(effects) > 1e-2


@pytest.mark.parametrize("words", [("man",), ("man", "woman")])
def test_a_picture_sampled_in_diffusers_is_comfyuis(host, loaded, toy_base, ip_moa, words):
    from moa_core.adapters.ip_adapter_file import IPAdapter
    from moa_core.subjects.subject import Subject
    from training.host.pipeline import MoAPipeline

    model, positive, negative = patched(host, loaded, ip_moa, *words)
    common = {"seed": 3, "steps": 8, "cfg": 4.0}
    latent = {"samples": torch.zeros(2, 4, IMAGE_SIZE // 8, IMAGE_SIZE // 8)}
    with torch.inference_mode(False):
        base = unsaturated(copy.deepcopy(toy_base))
    theirs = [
        host.run("KSampler", each, 3, 8, 4.0, "euler", "simple", positive, negative, latent)[0]["samples"]
        for each in (model, loaded[0])
    ]
    theirs, plain = (((base.autoencoder.decode(x.cpu()) + 1) / 2).clamp(0, 1).movedim(1, -1) for x in theirs)
    people = [Subject(s.features, s.word, s.name) for s in model.get_attachment("moa").subjects]
    pipeline = MoAPipeline(base, IPAdapter(outside(ip_moa), ip_moa.adapter.projector))
    ours, trace = pipeline(PROMPT, people, "ugly", batch=2, sampler="euler", **common)
    difference, effect = (ours - theirs).abs(), (theirs - plain).abs().max().item()
    apart = (difference > 2 / 255).float().mean().item()  # the plain checkpoint's two pictures differ by 1.4e-3
    print(f"max abs difference {difference.max():.1e} of the effect {effect:.2f}; {apart:.2%} over 2 / 255")
    # Between two people, rounding may decide whose a pixel is.
    assert apart <= (0.0 if len(words) == 1 else 0.01) and effect > 0.1
    areas = trace.subject_area(), model.get_attachment("moa").runs[-1].trace.subject_area()
    assert (areas[0] - areas[1]).abs().mean() < 1e-3


def test_a_lora_on_the_prior_acts_in_the_image_experts_too(host, loaded, ip_moa):
    """As a patch of the model or written into its file: the same picture."""
    import comfy.sd

    model, clip, _ = loaded
    weights = {n: w.cpu() for n, w in model.model.state_dict().items() if n.startswith("diffusion_model.")}
    random = torch.Generator().manual_seed(1)
    lora = {
        name: (0.1 * torch.randn(weight.shape, generator=random),)
        for name, weight in weights.items()
        if name.endswith(("attn2.to_q.weight", "attn2.to_out.0.weight"))
    }
    whole = {f"model.{n}": w + lora[n][0] if n in lora else w.clone() for n, w in weights.items()}
    written = comfy.sd.load_diffusion_model_state_dict(whole, {"dtype": torch.float32})
    changed = model.clone()
    assert len(changed.add_patches(lora)) == len(lora) > 0
    drawn = [
        host.sample(*patched(host, (each, clip), ip_moa, "man"), steps=3)["samples"]
        for each in (changed, written, model)
    ]
    assert (drawn[0] - drawn[1]).abs().max() < 1e-4 < 1e-2 < (drawn[0] - drawn[2]).abs().max()


def test_a_photo_is_cropped_as_clip_does_and_with_a_mask_round_the_person(host, loaded, ip_moa):
    photo = picture()
    whole = host.run("MoASubjectEncoder", ip_moa, photo, "man")[0].features
    output = ip_moa.clip_vision.encode_image(photo)
    expected = ip_moa.adapter.projector(output.penultimate_hidden_states.cpu()).flatten(1)
    torch.testing.assert_close(whole, expected)
    mask = torch.zeros(1, 60, 80)
    mask[:, 10:50, 30:70] = 1
    person = host.run("MoASubjectEncoder", ip_moa, photo, "man", mask)[0].features
    square = host.run("MoASubjectEncoder", ip_moa, photo[:, 8:52, 28:72], "man")[0].features
    torch.testing.assert_close(person, square)
    assert not torch.allclose(person, whole, atol=1e-2)


def test_subjects_blend_and_the_visualizer_shows_cross_attention_alone(host, loaded, ip_moa):
    one, two = (host.run("MoASubjectEncoder", ip_moa, picture(seed), "man")[0] for seed in (1, 2))
    morph = host.run("MoASubjectInterpolate", one, two, 0.5, 2, "slerp")[0]
    model, clip = host.patch(loaded[0], loaded[1], ip_moa, morph)
    samples = host.sample(model, host.prompt(clip, "a man"), host.prompt(clip, ""), steps=4, batch=2)
    image, mask = host.run("MoARouterVisualizer", model, samples)[:2]
    assert image.shape[0] == 2 and mask.shape == (2, 128, 128)
    assert {attention for _, attention in model.get_attachment("moa").runs[-1].trace.layers} == {"attn2"}


def test_after_the_last_step_of_a_persons_prompt_the_checkpoint_draws_alone(host, loaded, ip_moa):
    """The negative prompt as well: opposite nobody it is the checkpoint's."""
    area = torch.ones(1, 128, 128)
    model, positive, negative = patched(host, loaded, ip_moa, "man", area=area)
    timed = host.run("ConditioningSetTimestepRange", positive, 0.0, 0.5)[0]
    rest = host.run("ConditioningSetTimestepRange", host.prompt(loaded[1], "a house"), 0.5, 1.0)[0]
    latent = {"samples": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))}
    drawn = [
        host.run("KSamplerAdvanced", each, "enable", 3, 10, 4.0, "euler", "normal", timed + rest, negative, latent,
                 6, 10, "disable")[0]["samples"]
        for each in (model, loaded[0])
    ]  # fmt: skip
    assert torch.equal(*drawn)
    early = [host.sample(each, timed + rest, negative, steps=10)["samples"] for each in (model, loaded[0])]
    assert (early[0] - early[1]).abs().max() > 1e-2


def test_a_prompt_encoded_for_other_subjects_shows_nobody_and_says_so(host, loaded, ip_moa, caplog):
    model, _, negative = patched(host, loaded, ip_moa, "man", "woman")
    _, other, _ = patched(host, loaded, ip_moa, "man", "woman")
    drawn = [host.sample(each, other, negative, steps=4)["samples"] for each in (model, loaded[0])]
    assert torch.equal(*drawn) and "subject0 will not appear" in caplog.text


@pytest.mark.parametrize("name", ["area", "mask", "long", "wide"])
def test_areas_masks_long_prompts_and_pictures_that_are_not_square(host, loaded, ip_moa, monkeypatch, name):
    """Each person in a prompt of their own, or in the second chunk of one; the host may split rows as it likes."""
    long = "a house, " * 40 + PROMPT
    model, positive, negative = patched(host, loaded, ip_moa, "man", "woman", prompt=long if name == "long" else PROMPT)
    shape = {"size": 16} if name != "wide" else {"latent": {"samples": torch.zeros(1, 4, 12, 20)}}
    if name == "area":
        positive = host.run("ConditioningSetArea", positive, 64, 128, 0, 0, 1.0)[0] + positive
    if name == "mask":
        positive = host.run("ConditioningSetMask", positive, torch.eye(128)[None], "default", 1.0)[0] + positive
    together = host.sample(model, positive, negative, steps=4, **copy.deepcopy(shape))["samples"]
    plain = host.sample(loaded[0], positive, negative, steps=4, **copy.deepcopy(shape))["samples"]
    assert (together - plain).abs().max() > 1e-2
    monkeypatch.setattr(type(model.model), "memory_required", lambda *a, **k: 1e30)
    apart = host.sample(model, positive, negative, steps=4, **shape)["samples"]
    assert (together - apart).abs().max() < 1e-4 * together.abs().max()


def test_two_people_have_masks_that_part_the_subject_area_by_their_words(host, loaded, each_moa):
    people = [host.subject(each_moa, seed, word) for seed, word in enumerate(("man", "woman"))]
    model, clip = host.patch(*loaded[:2], each_moa, *people)
    drawn = host.sample(model, host.prompt(clip, PROMPT), host.prompt(clip, "ugly"), steps=4)
    _, whole, masks = host.run("MoARouterVisualizer", model, drawn)
    assert masks.shape == (2, 128, 128) and masks[0].any() and masks[1].any()
    assert (masks.sum(dim=0) <= whole[0]).all() and masks.sum() > 0.9 * whole.sum()


def test_the_wrong_vision_model_checkpoint_and_file_are_refused_in_a_sentence(host, loaded, toy_base, tmp_path):
    from moa_core.address import BlockShape

    with pytest.raises(ValueError, match=r"wide\.safetensors.*48 wide.*gives 64.*Load CLIP Vision"):
        adapter(host, toy_base.unet, tmp_path, "plus", "wide", hidden_size=64)
    with pytest.raises(ValueError, match=r"wide\.safetensors.*48 wide.*gives 32"):
        adapter(host, toy_base.unet, tmp_path, "base", "wide", projection_dim=32)
    folder = host.base / "models/ipadapter"
    for name, family, dim in (("sd15", r"SD 1\.5", 768), ("sdxl", "SDXL", 2048)):
        save_file(random_file("base", [BlockShape(320, dim)] * 3, dim), folder / f"{name}.safetensors")
        other = host.run("MoAFromIPAdapter", f"{name}.safetensors", vision(tmp_path))[0]
        with pytest.raises(
            ValueError, match=rf"{name}.*{family} \(3 .*text {dim} wide.*MoAToy.*an IP-Adapter made for"
        ):
            host.patch(loaded[0], loaded[1], other)
    (folder / "old.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"'old\.bin' is damaged, or a pickle of more than tensors"):
        host.run("MoAFromIPAdapter", "old.bin", vision(tmp_path))


def test_the_list_holds_what_is_read_and_the_usual_names_first(host):
    folder = host.base / "models/ipadapter"
    folder.mkdir(exist_ok=True)
    files = ["listed-a.safetensors", "listed-ip-adapter-plus_sd15.safetensors", "listed-ip-adapter-faceid_sd15.bin"]
    for name in (*files, "listed-ip-adapter-faceid_sd15_lora.safetensors", "listed.ckpt"):
        (folder / name).touch()
    try:
        options = host.nodes["MoAFromIPAdapter"].INPUT_TYPES()["required"]["ipadapter_name"][1]["options"]
    finally:
        for path in folder.glob("listed*"):
            path.unlink()
    assert [name for name in options if name.startswith("listed")] == [files[2], files[1], files[0]]
