"""MoA From IP-Adapter on SDXL: its prompts pass through two text encoders, its blocks hold up to ten transformers."""

import pytest
import torch
from image_experts import adapter, patched, picture
from narrow_sdxl import narrow_model, shallow_clip
from safetensors.torch import save_file
from sdxl import TINY, sdxl_unet

KEY = "moa_bound_prompt"
SIZES = {"width": 1024, "height": 1024, "crop_w": 0, "crop_h": 0, "target_width": 1024, "target_height": 1024}


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    with torch.inference_mode(False):
        return sdxl_unet(**TINY)


@pytest.fixture(scope="module")
def sdxl(host, unet):
    """MODEL and CLIP."""
    with torch.inference_mode():
        return narrow_model(unet), shallow_clip(str(host.base / "models/embeddings"))


@pytest.fixture
def ip_moa(host, unet, tmp_path):
    return adapter(host, unet, tmp_path, "plus", "ip-adapter-plus_sdxl")


def encoder(host, sdxl, ip_moa, *words: str):
    """The CLIP that binds people of these words."""
    people = [host.run("MoASubjectEncoder", ip_moa, picture(seed), word)[0] for seed, word in enumerate(words)]
    return host.patch(*sdxl, ip_moa, *people)[1]


def places(conditioning) -> list[tuple[int, str]]:
    return [(binding.position, binding.subject.word) for binding in conditioning[0][1][KEY].bindings]


def test_two_people_change_the_picture_each_in_one_step_too_and_strength_0_not_one_bit(host, sdxl, ip_moa):
    prompt = "a man and a woman in paris"
    plain = [host.prompt(sdxl[1], text) for text in (prompt, "ugly")]

    def drawn(*words, steps=5, **options):
        return host.sample(*patched(host, sdxl, ip_moa, *words, **options), steps=steps)["samples"]

    alone = host.sample(sdxl[0], *plain, steps=5)["samples"]
    man, both = drawn("man"), drawn("man", "woman")
    assert (man - alone).abs().max() > 1e-2 and (both - man).abs().max() > 1e-2
    assert torch.equal(drawn("man", widgets={"strength": 0.0}), alone)
    once = drawn("man", steps=1) - host.sample(sdxl[0], *plain, steps=1)["samples"]
    assert once.abs().max() > 1e-2


def test_rows_batched_or_split_give_the_same(host, sdxl, ip_moa, monkeypatch):
    model, positive, negative = patched(host, sdxl, ip_moa, "man", "woman")
    together = host.sample(model, positive, negative, batch=2, steps=4)["samples"]
    monkeypatch.setattr(type(model.model), "memory_required", lambda *a, **k: 1e30)
    apart = host.sample(model, positive, negative, batch=2, steps=4)["samples"]
    assert (together - apart).abs().max() < 1e-4 * together.abs().max()


def test_a_word_binds_where_both_text_encoders_see_it(host, sdxl, ip_moa):
    clip = encoder(host, sdxl, ip_moa, "man", "woman")
    prompt = "a woman and a (man:1.3), " + "a house, " * 40 + "a man"
    tokens = clip.tokenize(prompt)
    assert places(host.prompt(clip, prompt)) == [(5, "man"), (2, "woman")]
    assert all(chunks[0][5] == (tokens["l"][0][5][0], 1.3) for chunks in tokens.values())
    assert KEY not in host.prompt(sdxl[1], prompt)[0][1]


def test_different_texts_for_the_two_bind_in_either(host, sdxl, ip_moa):
    """CLIPTextEncodeSDXL; one is much longer than the other."""
    clip = encoder(host, sdxl, ip_moa, "man", "woman")
    texts = {"text_g": "a man in paris", "text_l": "oil on canvas, " * 30 + "a woman and a man"}
    conditioning = host.run("CLIPTextEncodeSDXL", clip=clip, **SIZES, **texts)[0]
    assert conditioning[0][0].shape[1] == 2 * 77
    positions = {word: [p for p, other in places(conditioning) if other == word] for word in ("man", "woman")}
    assert positions["man"][1] == 2 and positions["man"][0] == positions["woman"][0] + 3 > 77
    assert conditioning[0][1][KEY].prompt.count(" / ") == 1


def test_an_embedding_that_only_one_of_them_knows_moves_the_word_in_that_one(host, sdxl, ip_moa):
    save_file({"emb_params": torch.randn(3, 768)}, host.base / "models/embeddings/sd15-style.safetensors")
    clip = encoder(host, sdxl, ip_moa, "man")
    assert places(host.prompt(clip, "embedding:sd15-style a man")) == [(5, "man"), (2, "man")]


def test_an_appended_prompt_binds(host, sdxl, ip_moa):
    man = host.run("MoASubjectEncoder", ip_moa, picture(), "man")[0]
    model, clip = host.patch(*sdxl, ip_moa, man)
    both = host.run("ConditioningConcat", host.prompt(clip, "paris at night"), host.prompt(clip, "a man"))[0]
    negative = host.prompt(clip, "ugly")
    drawn = host.sample(model, both, negative, steps=4)["samples"]
    assert (drawn - host.sample(sdxl[0], both, negative, steps=4)["samples"]).abs().max() > 1e-2


def test_the_other_familys_adapter_checkpoint_clip_and_a_learned_moa_are_refused_by_name(
    host, loaded, moa, sdxl, ip_moa, toy_base, tmp_path
):
    small = adapter(host, toy_base.unet, tmp_path, "plus", "ip-adapter-plus_sd15")
    with pytest.raises(ValueError, match=r"ip-adapter-plus_sd15.*SD 1\.5 \(7 .*this MODEL is SDXL \(70 .*2048 wide"):
        host.patch(*sdxl, small)
    with pytest.raises(ValueError, match=r"ip-adapter-plus_sdxl.*SDXL \(70 .*this MODEL is MoAToy"):
        host.patch(*loaded[:2], ip_moa)
    with pytest.raises(ValueError, match=r"moa-stirred.*MoA toy.*this MODEL is SDXL"):
        host.patch(*sdxl, moa)
    with pytest.raises(ValueError, match="ToySD1ClipModel, but SDXL reads the text of CLIP-L and CLIP-G"):
        host.patch(sdxl[0], loaded[1], ip_moa)
    with pytest.raises(ValueError, match=r"SDXLClipModel, but SD 1\.5 reads the text of one CLIP-L"):
        host.patch(loaded[0], sdxl[1], small)
