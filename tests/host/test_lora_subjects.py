"""LoRA subjects in the host: each LoRA is itself where its word is, and what it leaves behind is nothing."""

import copy

import pytest
import torch
from lora_files import KINDS, random_lora
from safetensors.torch import save_file
from test_parity import calls

PROMPT, NEGATIVE = "a man and a woman in paris", "ugly"
KEY = "moa_bound_prompt"
EVERYWHERE = torch.ones(1, 32, 32)


def written(host, weights: dict, name: str = "some.safetensors") -> str:
    save_file(weights, host.base / "models/loras" / name)
    return name


def lora_subject(host, name: str, word: str = "man", trigger: str = "", strength: float = 1.0, clip=1.0, area=None):
    return host.run("MoALoRASubject", name, word, trigger, strength, clip, area)[0]


def drawn(host, model, positive, negative, **options):
    return host.sample(model, positive, negative, **options)["samples"]


def check_parity(host, model, clip, name: str, strength: float) -> float:
    """The LoRA as a subject in all of the picture, beside Load LoRA; the negative prompt is the plain CLIP's."""
    subject = lora_subject(host, name, "man", "", strength, strength, EVERYWHERE)
    patched, bound = host.patch(model, clip, None, subject)
    loaded_model, loaded_clip = host.run("LoraLoader", model, clip, name, strength, strength)
    negative = host.prompt(clip, NEGATIVE)
    plain = drawn(host, model, host.prompt(clip, PROMPT), negative)
    theirs = host.prompt(loaded_clip, PROMPT)
    theirs = [[theirs[0][0], host.prompt(clip, PROMPT)[0][1]]]  # SDXL's pooled vector is all people's
    theirs = drawn(host, loaded_model, theirs, negative)
    ours = drawn(host, patched, host.prompt(bound, PROMPT), negative)
    effect = (theirs - plain).abs().max()
    assert effect > 0.1
    return float((ours - theirs).abs().max() / effect)


@pytest.mark.parametrize("kind", KINDS)
def test_over_the_whole_picture_it_is_load_lora(host, loaded, kind):
    model, clip, _ = loaded
    name = written(
        host, random_lora(model, clip, kind=kind, scale=0.05 if kind == "loha" else 0.1), f"{kind}.safetensors"
    )
    difference = check_parity(host, model, clip, name, 0.7)
    print(f"{kind}: {difference:.1e} of the effect")
    assert difference < 1e-3


def test_so_it_is_on_sdxl_with_both_of_its_text_encoders(host, sdxl):
    name = written(host, random_lora(*sdxl[1], scale=0.05), "sdxl.safetensors")
    difference = check_parity(host, *sdxl[1], name, 1.0)
    print(f"SDXL: {difference:.1e} of the effect")
    assert difference < 1e-3


def test_the_order_of_two_does_not_matter_and_each_acts_where_it_is(host, loaded, loras):
    model, clip, _ = loaded
    left, right = torch.zeros(1, 32, 32), torch.zeros(1, 32, 32)
    left[..., :12], right[..., 20:] = 1, 1
    one = lora_subject(host, "random-0.safetensors", "man", area=left)
    other = lora_subject(host, "random-1.safetensors", "woman", area=right)

    def run(*subjects):
        patched, bound = host.patch(model, clip, None, *subjects)
        return drawn(host, patched, host.prompt(bound, PROMPT), host.prompt(clip, NEGATIVE), steps=1)

    plain = drawn(host, model, host.prompt(clip, PROMPT), host.prompt(clip, NEGATIVE), steps=1)
    both, turned = run(one, other), run(other, one)
    assert (both - turned).abs().max() < 1e-4 * both.abs().max()
    by_column = [(run(subject) - plain).abs().mean(dim=(0, 1, 2)) for subject in (one, other)]
    assert by_column[0][:6].mean() > 3 * by_column[0][10:].mean() > 0
    assert by_column[1][10:].mean() > 3 * by_column[1][:6].mean() > 0


def test_the_model_is_as_it_was_afterwards_whatever_ended_the_run(host, loaded, loras):
    model, clip, _ = loaded
    patched, bound = host.patch(model, clip, None, lora_subject(host, "random-0.safetensors"))
    positive, negative = host.prompt(bound, PROMPT), host.prompt(clip, NEGATIVE)
    plain = drawn(host, model, positive, negative)
    unet = model.model.diffusion_model

    def hooked() -> list[str]:
        return [name for name, layer in unet.named_modules() if layer._forward_hooks or layer._forward_pre_hooks]

    seen = []

    def fail(*step):
        seen.append(len(hooked()))
        raise InterruptedError

    import comfy.sample

    latent = torch.zeros(1, 4, 16, 16)
    noise = comfy.sample.prepare_noise(latent, 1)
    with pytest.raises(InterruptedError):
        comfy.sample.sample(
            patched, noise, 3, 4.0, "euler", "normal", positive, negative, latent, callback=fail, seed=1
        )
    assert seen == [seen[0]] and seen[0] > 50 and hooked() == []
    assert torch.equal(drawn(host, model, positive, negative), plain)
    assert not torch.equal(drawn(host, patched, positive, negative), plain) and hooked() == []
    assert torch.equal(drawn(host, model, positive, negative), plain)


def test_scouting_is_not_heard_of_and_one_step_shows_the_people(host, loaded, loras):
    import comfy.sample

    model, clip, _ = loaded
    patched, bound = host.patch(model, clip, None, lora_subject(host, "random-0.safetensors"))
    positive, negative = host.prompt(bound, PROMPT), host.prompt(clip, NEGATIVE)
    latent, steps = torch.zeros(1, 4, 16, 16), []
    noise = comfy.sample.prepare_noise(latent, 1)
    watched = comfy.sample.sample(
        patched, noise, 3, 4.0, "euler", "normal", positive, negative, latent, seed=1,
        callback=lambda step, *rest: steps.append(step),
    )  # fmt: skip
    assert steps == [0, 1, 2]
    assert torch.equal(watched, drawn(host, patched, positive, negative))
    once, plain = (drawn(host, each, positive, negative, steps=1) for each in (patched, model))
    assert (once - plain).abs().max() > 1e-2 and (once == plain).float().mean() < 1.0


def test_a_run_that_goes_on_from_anothers_end_keeps_everybodys_place(host, loaded, loras):
    model, clip, _ = loaded
    people = [lora_subject(host, "random-0.safetensors"), lora_subject(host, "random-1.safetensors", "woman")]
    patched, bound = host.patch(model, clip, None, *people)
    positive, negative = host.prompt(bound, PROMPT), host.prompt(clip, NEGATIVE)

    def part(latent, first, last, add_noise):
        return host.run(
            "KSamplerAdvanced", patched, "enable" if add_noise else "disable", 1, 6, 4.0, "euler", "normal", positive,
            negative, latent, first, last, "enable",
        )[0]  # fmt: skip

    empty = {"samples": torch.zeros(1, 4, 16, 16)}
    whole = part(empty, 0, 6, True)["samples"]
    halves = part(part(empty, 0, 3, True), 3, 6, False)["samples"]
    assert (halves - whole).abs().max() < 1e-3 * whole.abs().max()


def test_rows_batched_or_split_give_the_same(host, loaded, loras, monkeypatch):
    model, clip, _ = loaded
    people = [lora_subject(host, "random-0.safetensors"), lora_subject(host, "random-1.safetensors", "woman", "sks")]
    patched, bound = host.patch(model, clip, None, *people)
    positive, negative = host.prompt(bound, PROMPT), host.prompt(clip, NEGATIVE)
    together = drawn(host, patched, positive, negative, batch=2, steps=4)
    monkeypatch.setattr(type(model.model), "memory_required", lambda *a, **k: 1e30)
    apart = drawn(host, patched, positive, negative, batch=2, steps=4)
    assert (together - apart).abs().max() < 1e-4 * together.abs().max()


def test_where_another_node_has_replaced_the_attention_it_is_the_same(host, loaded, loras):
    model, clip, _ = loaded
    import comfy.ldm.modules.attention as attention

    def replaced(q, k, v, extra_options):
        return attention.optimized_attention(q, k, v, extra_options["n_heads"])

    people = [lora_subject(host, "random-0.safetensors"), lora_subject(host, "random-1.safetensors", "woman", "sks")]
    patched, bound = host.patch(model, clip, None, *people)
    positive, negative = host.prompt(bound, PROMPT), host.prompt(clip, NEGATIVE)
    other = patched.clone()
    for block, number in (("input", 1), ("middle", 0), ("output", 1)):
        other.set_model_attn2_replace(replaced, block, number)
    one, same = (drawn(host, each, positive, negative) for each in (patched, other))
    assert (one - same).abs().max() < 1e-4 * one.abs().max()


def own_texts(conditioning) -> list[torch.Tensor]:
    """The own text of every subject of a prompt, as it is used in this conditioning."""
    text, extra = conditioning[0]
    return [own.texts[0] for own in extra[KEY].as_in(text).own_texts]


@pytest.mark.parametrize(
    ("prompt", "trigger", "as_read"),
    [
        (PROMPT, "", PROMPT),
        (PROMPT, "sks person", "a sks person and a woman in paris"),
        ("a (man:1.3) in paris", "sks", "a (sks:1.3) in paris"),
        ("a (man:1.2) in paris", "(sks:1.5) person", "a (sks:1.8) (person:1.2) in paris"),
        ("a house, " * 40 + "a man", "sks", "a house, " * 40 + "a sks"),
    ],
)
def test_a_lora_reads_the_prompt_with_its_trigger_and_its_own_text_encoder(
    host, loaded, loras, prompt, trigger, as_read
):
    model, clip, _ = loaded
    bound = host.patch(model, clip, None, lora_subject(host, "random-0.safetensors", "man", trigger))[1]
    changed = host.run("LoraLoader", model, clip, "random-0.safetensors", 1.0, 1.0)[1]
    (own,) = own_texts(host.prompt(bound, prompt))
    expected = host.prompt(changed, as_read)[0][0]
    assert (own - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.equal(host.prompt(bound, prompt)[0][0], host.prompt(clip, prompt)[0][0])  # the prompt itself stays
    skipped = host.run("CLIPSetLastLayer", bound, -2)[0]
    (own,) = own_texts(host.prompt(skipped, prompt))
    expected = host.prompt(host.run("CLIPSetLastLayer", changed, -2)[0], as_read)[0][0]
    assert (own - expected).abs().max() < 1e-5 * expected.abs().max()


def test_each_of_two_reads_its_own_trigger_in_its_own_place(host, loaded, loras):
    model, clip, _ = loaded
    people = [lora_subject(host, "random-0.safetensors", "man", t, clip=0.0) for t in ("sks", "zwx person")]
    bound = host.patch(model, clip, None, *people)[1]
    first, second = own_texts(host.prompt(bound, "a man and a man"))
    for own, as_read in ((first, "a sks and a man"), (second, "a man and a zwx person")):
        torch.testing.assert_close(own, host.prompt(clip, as_read)[0][0])


def test_own_texts_are_there_after_concat_and_average(host, loaded, loras):
    model, clip, _ = loaded
    bound = host.patch(model, clip, None, lora_subject(host, "random-0.safetensors", "man", "sks", clip=0.0))[1]
    young, old, place = (host.prompt(bound, text) for text in ("a kid man", "an old man", "in paris at night"))
    joined = host.run("ConditioningConcat", young, place)[0]
    expected = torch.cat([host.prompt(clip, "a kid sks")[0][0], place[0][0]], dim=1)
    torch.testing.assert_close(own_texts(joined)[0], expected)
    blended = host.run("ConditioningAverage", young, old, 0.25)[0]
    moved = blended[0][0] - young[0][0]
    torch.testing.assert_close(own_texts(blended)[0], host.prompt(clip, "a kid sks")[0][0] + moved)


def test_a_morph_leads_from_one_lora_to_the_other(host, loaded, loras):
    model, clip, _ = loaded
    ends = [lora_subject(host, f"random-{n}.safetensors", "man", "sks", area=EVERYWHERE) for n in range(2)]
    morph = host.run("MoASubjectInterpolate", *ends, 0.5, 3, "linear")[0]

    def run(subject, batch):
        patched, bound = host.patch(model, clip, None, subject)
        latent = {"samples": torch.zeros(batch, 4, 16, 16), "batch_index": [0] * batch}
        return drawn(host, patched, host.prompt(bound, PROMPT), host.prompt(clip, NEGATIVE), latent=latent)

    frames, first, last = run(morph, 3), run(ends[0], 1), run(ends[1], 1)
    assert (frames[0] - first[0]).abs().max() < 1e-3 * first.abs().max()
    assert (frames[2] - last[0]).abs().max() < 1e-3 * last.abs().max()
    assert min((frames[1] - end[0]).abs().max() for end in (first, last)) > 1e-2


def test_an_fp8_checkpoint_takes_a_lora_subject(host, loaded, loras):
    import comfy.sd

    model, clip, _ = loaded
    weights = {n: w for n, w in model.model.state_dict().items() if n.startswith("diffusion_model.")}
    weights = {f"model.{name}": weight.clone() for name, weight in weights.items()}
    eighth = comfy.sd.load_diffusion_model_state_dict(weights, {"dtype": torch.float8_e4m3fn})
    patched, bound = host.patch(eighth, clip, None, lora_subject(host, "random-0.safetensors", area=EVERYWHERE))
    positive, negative = host.prompt(bound, PROMPT), host.prompt(clip, NEGATIVE)
    ours, plain = drawn(host, patched, positive, negative), drawn(host, eighth, positive, negative)
    full, bound = host.patch(model, clip, None, lora_subject(host, "random-0.safetensors", area=EVERYWHERE))
    exact = drawn(host, full, host.prompt(bound, PROMPT), negative)
    effect = (ours - plain).abs().max()
    assert ours.isfinite().all() and effect > 0.1 and (ours - exact).abs().max() < effect


def test_a_lora_and_a_photo_and_a_learned_subject_in_one_picture(host, loaded, loras, moa, ip_moa):
    model, clip, _ = loaded
    prompt = "a man and a woman and a person in paris"
    everyone = {
        "man": lora_subject(host, "random-0.safetensors", "man"),
        "woman": host.subject(ip_moa, 1, "woman"),
        "person": host.subject(moa, 2, "person"),
    }

    def run(*words):
        patched, bound = host.patch(model, clip, moa, *(everyone[word] for word in words))
        return drawn(host, patched, host.prompt(bound, prompt), host.prompt(clip, NEGATIVE), steps=4)

    together = run(*everyone)
    for word in everyone:
        others = [other for other in everyone if other != word]
        assert (together - run(*others)).abs().max() > 1e-2, word


def test_what_does_not_fit_is_refused_or_named(host, loaded, loras, sdxl, moa, caplog):
    model, clip, _ = loaded
    weights = random_lora(model, only="attn1.to_q")
    with pytest.raises(ValueError, match=r"'flux.*than this MoAToy MODEL: its 2 weights fit none.*LoRA Subject"):
        flux = {
            f"lora_unet_double_blocks_0_img_attn_qkv.{n}": torch.randn(4, 4)
            for n in ("lora_up.weight", "lora_down.weight")
        }
        host.patch(model, clip, None, lora_subject(host, written(host, flux, "flux.safetensors")))
    wide = random_lora(model, only="to_q")
    wide = {n: torch.cat([w, w], dim=1) if n.endswith("lora_down.weight") else w for n, w in wide.items()}
    with pytest.raises(ValueError, match=r"'wide.*another family than this MoAToy.*to_q.weight is for 64x128"):
        host.patch(model, clip, None, lora_subject(host, written(host, wide, "wide.safetensors")))
    timed = {"lora_unet_time_embedding_linear_1.lora_up.weight": torch.randn(256, 4)}
    timed["lora_unet_time_embedding_linear_1.lora_down.weight"] = torch.randn(4, 64)
    host.patch(model, clip, None, lora_subject(host, written(host, weights | timed, "timed.safetensors")))
    assert "'timed.safetensors': 1 of its changes are left out" in caplog.text
    with pytest.raises(ValueError, match="appears by a MOA, and none is connected"):
        host.patch(model, clip, None, host.subject(moa))
    with pytest.raises(ValueError, match="is a LoRA, and all of it is in its own file"):
        host.run("MoASaveSubject", lora_subject(host, "random-0.safetensors"), "ann")
    with pytest.raises(ValueError, match="'random-0.safetensors' is a LoRA and 'man' is none"):
        lora, photo = lora_subject(host, "random-0.safetensors"), host.subject(moa)
        host.run("MoASubjectInterpolate", lora, photo, 0.5, 1, "linear")
    with pytest.raises(ValueError, match="'word' is empty"):
        lora_subject(host, "random-0.safetensors", "  ")


def test_comfyui_and_diffusers_agree(host, loaded, toy_base):
    """Two LoRAs in two halves of the picture, one of them with a text of its own, at two noise levels."""
    from moa_core.adapters.deltas import deltas_of
    from moa_core.adapters.run import Adapters
    from moa_core.address import block_shapes
    from moa_core.run import Run
    from moa_core.subjects.binding import Binding, OwnText
    from moa_core.subjects.rows import Row
    from moa_core.subjects.subject import Subject
    from moa_core.subjects.view import View
    from training.host.adapter import MoAUNet
    from training.host.lora import read_lora
    from training.host.prior import prior_of

    names = [written(host, random_lora(loaded[0], seed=n), f"both-{n}.safetensors") for n in range(2)]
    left, right = torch.zeros(1, 16, 16), torch.zeros(1, 16, 16)
    left[..., :7], right[..., 9:] = 1, 1
    random = torch.Generator().manual_seed(3)
    context, own = (torch.randn(1, 77, 64, generator=random) for _ in range(2))
    inputs, timesteps = torch.randn(2, 2, 4, 16, 16, generator=random), torch.tensor([700.0, 300.0])

    subjects = [lora_subject(host, name, area=area) for name, area in zip(names, (left, right), strict=True)]
    patched = host.patch(*loaded[:2], None, *subjects)[0]
    binding, people = host.module("moa_core.subjects.binding"), patched.get_attachment("moa").subjects
    bound = tuple(binding.Binding(place, subject) for place, subject in zip((5, 60), people, strict=True))
    note = binding.BoundPrompt("a man and a man", bound, (binding.OwnText(people[1], (own,)),))
    sigmas = patched.get_model_object("model_sampling").sigma(timesteps)
    theirs = calls(patched, [[context, {KEY: note}]], inputs, sigmas)

    with torch.inference_mode(False):
        unet = copy.deepcopy(toy_base.unet)
    ours = [Subject(torch.ones(1, 1), "man", "man", area=area) for area in (left, right)]
    files = [read_lora(unet, host.base / "models/loras" / name) for name in names]
    adapters = Adapters({}, {ours[0]: [0], ours[1]: [1]}, deltas_of(unet, files))
    run = Run(ours, 2, (16, 16), 0.0, block_shapes(unet.state_dict()), adapters=adapters)
    bindings = tuple(Binding(place, subject) for place, subject in zip((5, 60), ours, strict=True))
    rows = [Row(View(n), bindings, 77, True, (OwnText(ours[1], (own,)),)) for n in range(2)]
    wrapped, contexts = MoAUNet(unet, None), context.expand(2, -1, -1)
    for x, timestep, their in zip(inputs, timesteps, theirs, strict=True):
        times = timestep.expand(2)
        call = run.call(rows, float(timestep), x, contexts, times, prior_of(unet))
        our, prior = wrapped.run(x, times, contexts, call), wrapped.run(x, times, contexts, None)
        effect = (our - prior).abs().max()
        assert effect > 0.1 and (our - their).abs().max() < 1e-5 * max(effect, our.abs().max())
