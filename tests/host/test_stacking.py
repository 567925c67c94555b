"""MoA beside its neighbours in a graph: each still acts, and so does MoA."""

import copy

import pytest
import torch
from safetensors.torch import save_file


def lora(host, model, clip, path):
    """A LoRA on one attention of the U-Net and one of the text encoder."""
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for name in (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_v",
        "lora_te_text_model_encoder_layers_1_self_attn_v_proj",
    ):
        weights[f"{name}.lora_down.weight"] = torch.randn(4, 64, generator=generator)
        weights[f"{name}.lora_up.weight"] = torch.randn(64, 4, generator=generator) * 0.1
    save_file(weights, path)
    return host.run("LoraLoader", model, clip, path.name, 1.0, 1.0)


def controlnet(host, model, path):
    import comfy.cldm.cldm

    unet_config = copy.deepcopy(model.model.model_config.unet_config)
    unet_config = {k: v for k, v in unet_config.items() if k not in ("out_channels", "transformer_depth_output")}
    net = comfy.cldm.cldm.ControlNet(hint_channels=3, **unet_config)
    generator = torch.Generator().manual_seed(8)
    weights = {
        f"control_model.{k}": torch.randn(v.shape, generator=generator) * 0.05 for k, v in net.state_dict().items()
    }
    save_file(weights, path)
    return host.run("ControlNetLoader", path.name)[0]


def attn2_patch(model):
    """What another pack's cross-attention patch does."""
    patched = model.clone()
    patched.set_model_attn2_patch(lambda n, context, value, extra_options: (n, context * 1.5, value * 0.5))
    return patched


MODEL_PATCHES = {
    "PAG": lambda host, m: host.run("PerturbedAttentionGuidance", m, 3.0)[0],
    "FreeU": lambda host, m: host.run("FreeU_V2", m, 1.3, 1.4, 0.9, 0.2)[0],
    "ToMe": lambda host, m: host.run("TomePatchModel", m, 0.5)[0],
    "HyperTile": lambda host, m: host.run("HyperTile", m, 32, 2, 0, False)[0],
    "attn2 patch": lambda host, m: attn2_patch(m),
    "RescaleCFG": lambda host, m: host.run("RescaleCFG", m, 0.7)[0],
}


@pytest.fixture(scope="module")
def subjects(host, moa):
    with torch.inference_mode():
        return [host.subject(moa, 1), host.subject(moa, 2, "woman")]


@pytest.fixture(scope="module")
def each_subjects(host, each_moa):
    with torch.inference_mode():
        return [host.subject(each_moa, 1), host.subject(each_moa, 2, "woman")]


PROMPT = "a man and a woman in paris"


def differ(a, b) -> bool:
    return bool((a - b).abs().max() > 1e-3 * b.abs().max())


@pytest.mark.parametrize("name", MODEL_PATCHES)
def test_model_patches_act_with_moa_in_either_order(host, loaded, each_moa, each_subjects, name):
    model, clip, _ = loaded
    apply = MODEL_PATCHES[name]
    negative = host.prompt(clip, "bad")
    alone, bound_clip = host.patch(model, clip, each_moa, *each_subjects)
    positive = host.prompt(bound_clip, PROMPT)
    moa_alone = host.sample(alone, positive, negative)["samples"]
    neighbour_alone = host.sample(apply(host, model), positive, negative)["samples"]
    first = host.sample(apply(host, alone), positive, negative)["samples"]
    after = host.patch(apply(host, model), clip, each_moa, *each_subjects)[0]
    second = host.sample(after, positive, negative)["samples"]
    assert differ(first, moa_alone)
    assert differ(first, neighbour_alone)
    # The subjects of the conditioning are those of one MoA Patch Model; the models differ in order alone.
    assert (first - second).abs().max() < 1e-4 * first.abs().max()


def test_lora_on_model_and_clip_in_either_order(host, loaded, each_moa, each_subjects):
    model, clip, _ = loaded
    path = host.base / "models/loras/test.safetensors"

    def run(model, clip):
        return host.sample(model, host.prompt(clip, PROMPT), host.prompt(clip, "bad"))["samples"]

    patched = host.patch(model, clip, each_moa, *each_subjects)
    after = lora(host, *patched, path)
    before = host.patch(*lora(host, model, clip, path), each_moa, *each_subjects)
    assert differ(run(*after), run(*patched))
    assert differ(run(*after), run(*lora(host, model, clip, path)))
    assert (run(*after) - run(*before)).abs().max() < 1e-4 * run(*after).abs().max()
    # Model and clip of the LoRA each act on their own.
    assert differ(run(after[0], patched[1]), run(*patched)) and differ(run(patched[0], after[1]), run(*patched))


def test_with_next_to_no_memory_the_picture_is_the_same(host, loaded, loras, each_moa, each_subjects, monkeypatch):
    """As --novram does it, here with the CPU in the GPU's place: every layer's weights are brought when it is asked,
    and a LoRA of the checkpoint is added to them there.
    """
    import comfy.model_management as management

    model, clip, _ = loaded
    styled = host.run("LoraLoader", model, clip, "random-3.safetensors", 0.5, 0.5)  # of every layer
    patched, bound_clip = host.patch(*styled, each_moa, *each_subjects)
    positive, negative = host.prompt(bound_clip, PROMPT), host.prompt(styled[1], "bad")
    management.unload_all_models()
    usual = host.sample(patched, positive, negative)["samples"]
    management.unload_all_models()
    monkeypatch.setattr(management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(management, "vram_state", management.VRAMState.NO_VRAM)
    assert torch.equal(host.sample(patched, positive, negative)["samples"], usual)
    held = [patched, *patched.get_additional_models_with_key("moa")]
    assert len(held) > 1 and all(each.model.model_lowvram for each in held)
    management.unload_all_models()


def test_a_lora_by_hooks_with_a_schedule(host, loaded, each_moa, each_subjects):
    """The host then encodes the prompt once for every part of the schedule, and swaps weights while it samples."""
    model, clip, _ = loaded
    path = host.base / "models/loras/test.safetensors"
    patched, bound_clip = host.patch(model, clip, each_moa, *each_subjects)
    lora(host, model, clip, path)
    keyframes = host.run("CreateHookKeyframe", strength_mult=0.2, start_percent=0.0)[0]
    keyframes = host.run("CreateHookKeyframe", strength_mult=1.0, start_percent=0.5, prev_hook_kf=keyframes)[0]
    hooks = host.run("CreateHookLora", lora_name=path.name, strength_model=1.0, strength_clip=1.0)[0]
    hooks = host.run("SetHookKeyframes", hooks=hooks, hook_kf=keyframes)[0]

    def run(model, clip, apply_to_conds=True):
        hooked = host.run("SetClipHooks", clip=clip, apply_to_conds=apply_to_conds, schedule_clip=True, hooks=hooks)[0]
        return host.sample(model, host.prompt(hooked, PROMPT), host.prompt(hooked, "bad"))["samples"]

    both = run(patched, bound_clip)
    assert differ(both, run(model, clip))
    assert differ(
        both, host.sample(patched, host.prompt(bound_clip, PROMPT), host.prompt(bound_clip, "bad"))["samples"]
    )
    assert differ(both, run(patched, bound_clip, False))


def test_controlnet(host, loaded, each_moa, each_subjects):
    model, clip, _ = loaded
    net = controlnet(host, model, host.base / "models/controlnet/test.safetensors")
    hint = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(3))
    patched, bound_clip = host.patch(model, clip, each_moa, *each_subjects)
    positive, negative = host.prompt(bound_clip, PROMPT), host.prompt(bound_clip, "bad")
    steered = host.run("ControlNetApplyAdvanced", positive, negative, net, hint, 1.0, 0.0, 1.0)
    both = host.sample(patched, *steered)["samples"]
    assert differ(both, host.sample(patched, positive, negative)["samples"])
    assert differ(both, host.sample(model, *steered)["samples"])


CONDITIONING = {
    "Combine": lambda host, a, b: host.run("ConditioningCombine", a, b)[0],
    "Average": lambda host, a, b: host.run("ConditioningAverage", a, b, 0.6)[0],
    "Concat": lambda host, a, b: host.run("ConditioningConcat", a, b)[0],
    "SetArea": lambda host, a, b: host.run(
        "ConditioningCombine", host.run("ConditioningSetArea", a, 64, 128, 0, 0, 1.0)[0], b
    )[0],
    "SetMask": lambda host, a, b: host.run(
        "ConditioningCombine", host.run("ConditioningSetMask", a, torch.eye(128)[None], "default", 1.0)[0], b
    )[0],
    "SetTimestepRange": lambda host, a, b: host.run(
        "ConditioningCombine", host.run("ConditioningSetTimestepRange", a, 0.0, 0.6)[0], b
    )[0],
}


@pytest.mark.parametrize("name", CONDITIONING)
def test_conditioning_nodes(host, loaded, moa, subjects, name):
    model, clip, _ = loaded
    patched, bound_clip = host.patch(model, clip, moa, *subjects)
    negative = host.prompt(bound_clip, "bad")

    def conditioned(clip):
        return CONDITIONING[name](host, host.prompt(clip, PROMPT), host.prompt(clip, "a forest at night"))

    both = host.sample(patched, conditioned(bound_clip), negative)["samples"]
    assert differ(both, host.sample(patched, host.prompt(bound_clip, PROMPT), negative)["samples"])  # the node acts
    assert differ(both, host.sample(model, conditioned(clip), negative)["samples"])  # MoA acts
    assert differ(both, host.sample(patched, conditioned(clip), negative)["samples"])  # and its bindings do


def test_clip_skip(host, loaded, moa, subjects):
    model, clip, _ = loaded
    patched, bound_clip = host.patch(model, clip, moa, *subjects)
    skipped = host.run("CLIPSetLastLayer", bound_clip, -2)[0]
    both = host.sample(patched, host.prompt(skipped, PROMPT), host.prompt(skipped, "bad"))["samples"]
    assert differ(
        both, host.sample(patched, host.prompt(bound_clip, PROMPT), host.prompt(bound_clip, "bad"))["samples"]
    )
    plain = host.run("CLIPSetLastLayer", clip, -2)[0]
    unbound = host.sample(patched, host.prompt(plain, PROMPT), host.prompt(plain, "bad"))["samples"]
    assert differ(both, unbound)


def sampler_names() -> list[str]:
    """Asked of the host when the test runs; collection must work without one."""
    import comfy.samplers

    return comfy.samplers.KSampler.SAMPLERS


def test_every_sampler_of_ksampler(host, loaded, moa, subjects):
    model, clip, _ = loaded
    patched, bound_clip = host.patch(model, clip, moa, *subjects)
    positive, negative = host.prompt(bound_clip, PROMPT), host.prompt(bound_clip, "bad")
    for sampler in sampler_names():
        with_moa = host.sample(patched, positive, negative, sampler=sampler)["samples"]
        plain = host.sample(model, positive, negative, sampler=sampler)["samples"]
        assert with_moa.isfinite().all(), sampler
        assert differ(with_moa, plain), sampler


def guiders(host, model, positive, negative):
    return {
        "CFGGuider": host.run("CFGGuider", model, positive, negative, 4.0)[0],
        "BasicGuider": host.run("BasicGuider", model, positive)[0],
        "DualCFGGuider": host.run("DualCFGGuider", model, positive, positive, negative, 4.0, 2.0, "regular")[0],
    }


@pytest.mark.parametrize("name", ["CFGGuider", "BasicGuider", "DualCFGGuider"])
def test_guiders_of_sampler_custom(host, loaded, moa, subjects, name):
    model, clip, _ = loaded
    patched, bound_clip = host.patch(model, clip, moa, *subjects)

    def run(model, positive, negative):
        guider = guiders(host, model, positive, negative)[name]
        noise = host.run("RandomNoise", 5)[0]
        sampler, sigmas = host.run("KSamplerSelect", "euler")[0], host.run("BasicScheduler", model, "normal", 3, 1.0)[0]
        latent = {"samples": torch.zeros(1, 4, 16, 16)}
        return host.run("SamplerCustomAdvanced", noise, guider, sampler, sigmas, latent)[0]["samples"]

    bound, bound_negative = host.prompt(bound_clip, PROMPT), host.prompt(bound_clip, "a bad man and woman")
    plain, plain_negative = host.prompt(clip, PROMPT), host.prompt(clip, "a bad man and woman")
    assert differ(run(patched, bound, bound_negative), run(model, plain, plain_negative))
    assert differ(run(patched, bound, bound_negative), run(patched, plain, bound_negative))
    # Wherever the guider puts its negative prompt, nothing binds there.
    assert torch.equal(run(patched, bound, bound_negative), run(patched, bound, plain_negative))


def test_a_word_in_an_appended_prompt_binds_and_counts_on(host, loaded, moa, subjects):
    """ConditioningConcat keeps nothing of the appended prompt but its embedding."""
    model, clip, _ = loaded
    man, woman = subjects
    other = host.subject(moa, 3)

    def bindings(first, second, *people):
        patched, bound_clip = host.patch(model, clip, moa, *people)
        both = host.run("ConditioningConcat", host.prompt(bound_clip, first), host.prompt(bound_clip, second))[0]
        return host.sample(patched, both, host.prompt(clip, "bad"))["samples"]

    alone = bindings("paris at night", "a man with a hat", man)
    assert differ(alone, bindings("paris at night", "a man with a hat", other))
    assert differ(alone, bindings("paris at night", "a man with a hat", woman))  # her word is not there
    # "a man ..., a man ...": the second subject takes the second one, though a prompt of its own begins there.
    two = bindings("a man in paris", "a man with a hat", man, other)
    assert differ(two, bindings("a man in paris", "a man with a hat", man, host.subject(moa, 4)))
    assert differ(two, bindings("a man in paris", "a man with a hat", man))


def window(host, model, length, overlap):
    """Context windows of that many pictures."""
    widgets = {"context_length": length, "context_overlap": overlap, "context_schedule": "standard_static"}
    others = {"context_stride": 1, "closed_loop": False, "fuse_method": "flat", "dim": 0, "freenoise": False}
    return host.run("ContextWindowsManual", model=model, **widgets, **others)[0]


@pytest.mark.parametrize("overlap", [0, 2])
def test_a_morph_in_context_windows_is_the_morph_in_one_batch(host, loaded, each_moa, monkeypatch, overlap):
    model, clip, _ = loaded
    morph = host.run("MoASubjectInterpolate", host.subject(each_moa, 1), host.subject(each_moa, 2), 0.5, 8, "linear")[0]
    patched, bound_clip = host.patch(model, clip, each_moa, morph)
    positive, negative = host.prompt(bound_clip, "a man"), host.prompt(clip, "bad")
    windowed = window(host, patched, 4, overlap)
    together = host.sample(patched, positive, negative, batch=8)
    calls, real = [], type(model.model).apply_model

    def counted(self, x, *args, **kwargs):
        calls.append(len(x))
        return real(self, x, *args, **kwargs)

    monkeypatch.setattr(type(model.model), "apply_model", counted)
    apart = host.sample(windowed, positive, negative, batch=8)
    assert max(calls) < 16  # positive and negative of eight pictures
    assert (together["samples"] - apart["samples"]).abs().max() < 1e-4 * together["samples"].abs().max()
    areas = [host.run("MoARouterVisualizer", m, latent) for m, latent in ((patched, together), (windowed, apart))]
    assert areas[0][0].shape == areas[1][0].shape and (areas[0][0] - areas[1][0]).abs().max() < 0.05
    assert torch.equal(areas[0][1], areas[1][1])


@pytest.mark.parametrize("factor", [1.5, 2.0])
def test_the_visualizer_after_deep_shrink(host, loaded, each_moa, each_subjects, factor):
    """Its layers have sizes of their own, and others after the first part of the sampling."""
    model, clip, _ = loaded
    patched, bound_clip = host.patch(model, clip, each_moa, *each_subjects)
    widgets = [1, factor, 0.0, 0.5, True, "bicubic", "bicubic"]
    shrunk = host.run("PatchModelAddDownscale", patched, *widgets)[0]
    positive, negative = host.prompt(bound_clip, PROMPT), host.prompt(bound_clip, "bad")
    latent = {"samples": torch.zeros(1, 4, 24, 18)}
    drawn = host.sample(shrunk, positive, negative, latent=latent)
    assert differ(drawn["samples"], host.sample(patched, positive, negative, latent=latent)["samples"])
    assert host.run("MoARouterVisualizer", shrunk, drawn)[1].shape == (1, 192, 144)


def test_steps_that_a_cache_skips_leave_no_trace(host, loaded, each_moa, each_subjects):
    model, clip, _ = loaded
    patched, bound_clip = host.patch(model, clip, each_moa, *each_subjects)
    positive, negative = host.prompt(bound_clip, PROMPT), host.prompt(bound_clip, "bad")
    cached = host.run("EasyCache", patched, 1e9, 0.0, 1.0, False)[0]  # skips whatever it can
    drawn = host.sample(cached, positive, negative, steps=6)
    assert differ(drawn["samples"], host.sample(patched, positive, negative, steps=6)["samples"])
    picture, mask, *_ = host.run("MoARouterVisualizer", cached, drawn)
    assert picture.shape[0] == 1 and mask.shape == (1, 128, 128)


def test_a_compiled_model(host, loaded, each_moa, each_subjects):
    """In a server that has already sampled the plain checkpoint compiled, and so holds graphs without MoA."""
    from torch._dynamo.utils import counters

    model, clip, _ = loaded
    backend = "eager"  # dynamo as with inductor, without a compiler's minutes
    patched, bound_clip = host.patch(model, clip, each_moa, *each_subjects)
    positive, negative = host.prompt(bound_clip, PROMPT), host.prompt(bound_clip, "bad")
    nobody = host.prompt(bound_clip, "a house")
    expected = host.sample(patched, positive, negative)["samples"]
    compiled = host.run("TorchCompileModel", model, backend)[0]
    plain = host.sample(compiled, nobody, negative)["samples"]
    before = host.patch(compiled, clip, each_moa, *each_subjects)[0]
    for both in (host.run("TorchCompileModel", patched, backend)[0], before):
        assert (host.sample(both, positive, negative)["samples"] - expected).abs().max() < 1e-3 * expected.abs().max()
        graphs = dict(counters["stats"])
        host.sample(both, positive, negative, steps=20)
        assert counters["stats"] == graphs  # no step was compiled anew
        assert torch.equal(host.sample(both, nobody, negative)["samples"], plain)
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize(("dtype", "routing"), [("fp16", "sparse"), ("bf16", "dense")])
def test_half_precision_costs_moa_no_more_than_the_prior(host, loaded, each_moa, each_subjects, dtype, routing):
    """What a GPU samples in."""
    model, clip, _ = loaded
    half = host.run("ModelComputeDtype", model, dtype)[0]

    def error(models, clip) -> float:
        drawn = [
            host.sample(m, host.prompt(clip, PROMPT), host.prompt(clip, "bad"), steps=5)["samples"] for m in models
        ]
        return float((drawn[0] - drawn[1]).abs().mean())

    (patched, bound_clip), (exact, _) = (
        host.patch(one, clip, each_moa, *each_subjects, routing=routing) for one in (half, model)
    )
    assert 0 < error((patched, exact), bound_clip) < 2 * error((half, model), clip)
