"""What holds for every MODEL that MoA Patch Model returns (DESIGN's invariants), in a real ComfyUI."""

import dataclasses

import pytest
import torch

from moa_core.learned.moa import MoA
from moa_core.learned.moa_file import save_moa


@pytest.fixture
def scene(host, loaded, moa):
    """The base model's sample, and everything to patch it with."""
    model, clip, _ = loaded
    positive, negative = host.prompt(clip, "a man and a man in paris"), host.prompt(clip, "a bad man")
    return model, clip, positive, negative, [host.subject(moa, 1), host.subject(moa, 2)]


def test_strength_0_and_outside_the_percents_change_not_one_bit(host, scene, moa):
    model, clip, positive, negative, subjects = scene
    plain = host.sample(model, positive, negative)["samples"]
    late = host.sample(model, positive, negative, steps=1)["samples"]
    for widgets in ({"strength": 0.0}, {"start_percent": 1.0}):
        patched, patched_clip = host.patch(model, clip, moa, *subjects, **widgets)
        bound, bound_negative = (
            host.prompt(patched_clip, "a man and a man in paris"),
            host.prompt(patched_clip, "a bad man"),
        )
        assert torch.equal(bound[0][0], positive[0][0])  # the text embedding itself is the CLIP's own
        assert torch.equal(host.sample(patched, bound, bound_negative)["samples"], plain)
    patched, patched_clip = host.patch(model, clip, moa, *subjects, start_percent=0.5)
    bound = host.prompt(patched_clip, "a man and a man in paris")
    assert torch.equal(host.sample(patched, bound, negative, steps=1)["samples"], late)
    assert not torch.allclose(host.sample(patched, bound, negative)["samples"], plain, atol=1e-2)


def test_a_moa_acts_on_the_timesteps_it_was_trained_on_and_in_the_last_step(host, scene, moa, stirred_moa):
    """Trained below 500, it begins where start_percent 0.5 would let any MoA begin; a single step is its too."""
    model, clip, positive, negative, subjects = scene
    with torch.inference_mode(False):
        trained = MoA(dataclasses.replace(stirred_moa.config, timesteps=500))
        trained.load_state_dict(stirred_moa.state_dict())
        save_moa(trained, host.base / "models/moa/moa-late.safetensors", torch.float32)
    limited = host.run("MoALoader", "moa-late.safetensors")[0]
    for routing in ("sparse", "dense"):
        drawn = {}
        for name, one, widgets in (
            ("limited", limited, {}), ("late", moa, {"start_percent": 0.5}), ("whole", moa, {}),
        ):  # fmt: skip
            patched, patched_clip = host.patch(model, clip, one, *subjects, routing=routing, **widgets)
            bound = host.prompt(patched_clip, "a man and a man in paris")
            drawn[name] = host.sample(patched, bound, negative, steps=5)["samples"]
            if name == "limited":
                one_step = host.sample(patched, bound, negative, steps=1)["samples"]
                assert (one_step - host.sample(model, positive, negative, steps=1)["samples"]).abs().max() > 1e-2
        assert torch.equal(drawn["limited"], drawn["late"])
        assert (drawn["limited"] - drawn["whole"]).abs().max() > 1e-2
    begun = [  # one step of five, for another run to go on with
        host.run(
            "KSamplerAdvanced", each, "enable", 1, 5, 4.0, "euler", "normal", prompt, negative,
            {"samples": torch.zeros(1, 4, 16, 16)}, 0, 1, "enable",
        )[0]["samples"]
        for each, prompt in ((host.patch(model, clip, limited, *subjects)[0], bound), (model, positive))
    ]  # fmt: skip
    assert torch.equal(*begun)


@pytest.mark.parametrize("prompt", ["a house in paris", "a man and a man in paris"])
def test_nothing_bound_changes_not_one_bit_and_the_visualizer_says_so(host, scene, moa, prompt):
    model, clip, _, negative, subjects = scene
    people = subjects if prompt == "a house in paris" else []
    plain = host.sample(model, host.prompt(clip, prompt), negative, batch=2)
    patched, patched_clip = host.patch(model, clip, moa, *people)
    drawn = host.sample(patched, host.prompt(patched_clip, prompt), negative, batch=2)
    assert torch.equal(drawn["samples"], plain["samples"])
    image = torch.rand(2, 128, 128, 3)
    picture, mask, *_ = host.run("MoARouterVisualizer", patched, drawn, image)
    assert mask.shape == (2, 128, 128) and not mask.any()
    assert picture.shape[0] == 2 and not torch.equal(picture[0], picture[1])  # each beside its own picture
    run = patched.get_attachment("moa").runs[-1]
    first, *reasons = host.module("nodes.router_visualizer").nothing_to_see(run)
    assert "Nothing was bound" in first
    assert "'a house in paris' does not hold the word 'man'" in reasons[0] if people else "No subject" in reasons[0]


def test_the_unpatched_model_and_clip_stay_as_they_were(host, scene, moa):
    model, clip, positive, negative, subjects = scene
    before = host.sample(model, positive, negative)["samples"]
    patched, patched_clip = host.patch(model, clip, moa, *subjects)
    host.sample(patched, host.prompt(patched_clip, "a man and a man"), negative)
    assert torch.equal(host.sample(model, positive, negative)["samples"], before)
    assert host.prompt(clip, "a man and a man in paris")[0][1].keys() == positive[0][1].keys()


def test_the_visualizers_colours_end_at_the_largest_share(host):
    """Routers that give the expert a tenth at most are seen as well as those that give it everything."""
    picture, module = host.module("nodes.evidence.router_picture"), host.module("moa_core.address")
    layer = module.Address.parse("middle.0.0"), "attn1"
    for largest in (0.1, 1.0):
        trace = host.module("moa_core.routing.trace").Trace((2, 2), [])
        trace.add(500.0, {layer: largest * torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])})
        drawn = picture.draw_trace(trace, trace.subject_area()[0], 0, None)
        brightest = torch.tensor(picture.STOPS[-1]) / 255
        cells = drawn[picture.HEAD :, : -picture.LEGEND]  # without the colour bar
        assert ((cells - brightest).abs().amax(dim=-1) < 0.01).sum() > picture.CELL**2 / 5, largest


@pytest.mark.parametrize("routing", ["sparse", "dense"])
@pytest.mark.parametrize("bound", [True, False])
def test_a_fresh_moa_samples_as_the_prior(host, scene, fresh, routing, bound):
    model, clip, positive, negative, _ = scene
    plain = host.sample(model, positive, negative)["samples"]
    subjects = [host.subject(fresh, 1), host.subject(fresh, 2)] if bound else []
    patched, patched_clip = host.patch(model, clip, fresh, *subjects, routing=routing)
    out = host.sample(patched, host.prompt(patched_clip, "a man and a man in paris"), negative)["samples"]
    assert (out - plain).abs().max() < 1e-5 * plain.abs().max()


def test_subjects_change_the_picture_each_its_own_way(host, scene, moa):
    model, clip, _, negative, (one, two) = scene
    out = []
    for subjects in ([one, two], [two, one], [one, one]):
        patched, patched_clip = host.patch(model, clip, moa, *subjects)
        out.append(host.sample(patched, host.prompt(patched_clip, "a man and a man in paris"), negative)["samples"])
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (out[a] - out[b]).abs().max() > 1e-3


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_rows_batched_or_split_in_any_order_give_the_same(host, scene, moa, monkeypatch, sampler):
    """The host calls the U-Net once for all rows, or row by row when memory is short; heun, twice a step."""
    model, clip, _, _, subjects = scene
    patched, patched_clip = host.patch(model, clip, moa, *subjects)
    positive = host.prompt(patched_clip, "a man and a man in paris")
    long_negative = host.prompt(patched_clip, "a bad man, " + "ugly, " * 60)  # two chunks: the positive is repeated
    for negative in (host.prompt(patched_clip, "a bad man"), long_negative):
        calls = []
        real = type(patched.model).apply_model

        def counted(self, x, *args, real=real, calls=calls, **kwargs):
            calls.append(len(x))
            return real(self, x, *args, **kwargs)

        monkeypatch.setattr(type(patched.model), "apply_model", counted)
        together = host.sample(patched, positive, negative, batch=2, steps=4, sampler=sampler)["samples"]
        assert set(calls) == {4}
        calls.clear()
        monkeypatch.setattr(type(patched.model), "memory_required", lambda *a, **k: 1e30)
        apart = host.sample(patched, positive, negative, batch=2, steps=4, sampler=sampler)["samples"]
        assert set(calls) == {2}
        monkeypatch.undo()
        assert (together - apart).abs().max() < 1e-4 * together.abs().max()
        one = host.sample(patched, positive, negative, batch=1, steps=4, sampler=sampler)["samples"]
        assert (together[:1] - one).abs().max() < 1e-4 * together.abs().max()


def test_words_in_the_negative_prompt_never_bind(host, scene, moa):
    model, clip, _positive, _, subjects = scene
    patched, patched_clip = host.patch(model, clip, moa, *subjects)
    bound = host.prompt(patched_clip, "a man and a man in paris")
    negatives = [host.prompt(c, "a man and a man in rome") for c in (clip, patched_clip)]
    with_note, without = [host.sample(patched, bound, n)["samples"] for n in reversed(negatives)]
    assert torch.equal(with_note, without)


def test_a_morph_is_one_run_of_single_pictures(host, scene, moa):
    """frames variants: the n-th picture of the batch is what the n-th variant alone would give."""
    model, clip, _, negative, (one, two) = scene
    morph = host.run("MoASubjectInterpolate", one, two, 0.5, 3, "slerp")[0]
    patched, patched_clip = host.patch(model, clip, moa, morph)
    noise = torch.zeros(1, 4, 16, 16)
    same_noise = {"samples": noise.repeat(3, 1, 1, 1), "batch_index": [0, 0, 0]}
    frames = host.sample(patched, host.prompt(patched_clip, "a man"), negative, latent=same_noise)["samples"]
    for index, end in ((0, one), (2, two)):
        alone, alone_clip = host.patch(model, clip, moa, end)
        picture = host.sample(alone, host.prompt(alone_clip, "a man"), negative)["samples"]
        assert (frames[index] - picture[0]).abs().max() < 1e-3
    assert (frames[1] - frames[0]).abs().max() > 1e-2


def test_sparse_begins_as_dense_and_then_leaves_out_the_expert_outside_the_subjects(host, scene, moa):
    """So in a second pass, too, which begins without an area of its own."""
    model, clip, positive, negative, subjects = scene
    plain = host.sample(model, positive, negative, steps=4)["samples"]
    first_pass = {"samples": plain}
    for options in ({}, {"latent": first_pass, "denoise": 0.5}):
        out = {}
        for routing in ("sparse", "dense"):
            patched, patched_clip = host.patch(model, clip, moa, *subjects, routing=routing)
            bound = host.prompt(patched_clip, "a man and a man in paris")
            for steps in (1, 4):
                out[routing, steps] = host.sample(patched, bound, negative, steps=steps, **options)["samples"]
        assert torch.equal(out["sparse", 1], out["dense", 1])
        assert (out["sparse", 4] - out["dense", 4]).abs().max() > 1e-2
        assert (out["sparse", 4] - plain).abs().max() > 1e-2


def test_experts_attend_through_the_hosts_attention_and_through_what_is_put_in_its_place(host, scene, moa):
    model, clip, positive, negative, subjects = scene
    patched, patched_clip = host.patch(model, clip, moa, *subjects)
    bound = host.prompt(patched_clip, "a man and a man in paris")
    before = host.sample(patched, bound, negative, steps=1)["samples"]
    calls = {}
    for name, one, prompt in (("plain", model, positive), ("moa", patched, bound)):
        calls[name] = []

        def watched(attention, *args, seen=calls[name], **kwargs):
            seen.append(args[0].shape)
            return attention(*args, **kwargs)

        other = one.clone()
        other.model_options["transformer_options"]["optimized_attention_override"] = watched
        out = host.sample(other, prompt, negative, steps=1)["samples"]
    assert torch.equal(out, before)
    assert len(calls["moa"]) == 2 * len(calls["plain"]) > 0


def test_the_host_loads_counts_and_unloads_the_experts(host, scene, moa):
    import comfy.model_management as mm

    model, clip, _, negative, subjects = scene
    patched, patched_clip = host.patch(model, clip, moa, *subjects)
    positive = host.prompt(patched_clip, "a man and a man")
    mm.unload_all_models()
    before = host.sample(patched, positive, negative)["samples"]
    mixture = moa.mixture.model
    (held,) = [
        loaded for loaded in mm.current_loaded_models if loaded.model is not None and loaded.model.model is mixture
    ]
    assert held.model_memory() == sum(p.nbytes for p in mixture.parameters())
    mm.unload_all_models()
    assert not any(loaded.model.model is mixture for loaded in mm.current_loaded_models)
    assert torch.equal(host.sample(patched, positive, negative)["samples"], before)
    mm.unload_all_models()
    host.sample(model, positive, negative)  # the unpatched model does not want them
    assert not any(loaded.model.model is mixture for loaded in mm.current_loaded_models)


def test_the_order_of_subjects_is_their_sockets_not_the_dictionarys(host, scene, moa):
    model, clip, _, _, (one, two) = scene
    _, bound_clip = host.run("MoAPatchModel", model, clip, moa, {"subject1": two, "subject0": one})
    bindings = host.prompt(bound_clip, "a man and a man")[0][1]["moa_bound_prompt"].bindings
    assert [b.subject for b in bindings] == [one, two]


def test_every_subject_has_a_mask_of_their_own_in_the_order_of_the_sockets(host, scene, moa):
    """Both are men: the areas say where each of them may be."""
    model, clip, _, negative, _ = scene
    sides = [torch.zeros(1, 128, 128) for _ in range(2)]
    sides[0][..., 64:], sides[1][..., :64] = 1, 1
    picture = torch.rand(1, 64, 64, 3)
    men = [host.run("MoASubjectEncoder", moa, picture, "man", area=side)[0] for side in sides]
    woman = host.subject(moa, 3, "woman")
    patched, patched_clip = host.patch(model, clip, moa, woman, *men)
    drawn = host.sample(patched, host.prompt(patched_clip, "a man and a man"), negative, batch=2)
    _, whole, masks = host.run("MoARouterVisualizer", patched, drawn)
    assert masks.shape == (6, 128, 128) and whole.any()
    for absent, right, left, area in zip(masks[::3], masks[1::3], masks[2::3], whole, strict=True):
        assert not absent.any() and torch.equal(right, area * sides[0][0]) and torch.equal(left, area * sides[1][0])
    patched, patched_clip = host.patch(model, clip, moa, host.subject(moa, 1))
    drawn = host.sample(patched, host.prompt(patched_clip, "a man in paris"), negative)
    _, whole, masks = host.run("MoARouterVisualizer", patched, drawn)
    assert torch.equal(whole, masks)
