"""MoA From PhotoMaker in a real ComfyUI, on a narrow SDXL, beside what ComfyUI's own nodes make of the same file."""

import copy

import pytest
import torch
import torch.nn.functional as F
from face_pictures import photo
from lora_files import random_lora
from narrow_sdxl import narrow_model, texts_outside
from photomaker_files import of_comfyui, random_photomaker
from safetensors.torch import save_file
from test_report import report_of_pasted

KEY = "moa_bound_prompt"
PROMPT = "a man in paris"
EVERYWHERE = torch.ones(1, 32, 32)


@pytest.fixture(scope="module")
def file(host, sdxl):
    """The parts of a file that is there as a pickle and as safetensors."""
    vision = of_comfyui(host)["VISION_CONFIG_DICT"]
    whole = dict(vision)
    vision.update(num_hidden_layers=1, intermediate_size=64)
    with torch.inference_mode():
        parts = random_photomaker(host, sdxl[0])
        (host.base / "models/photomaker").mkdir(exist_ok=True)
        torch.save(parts, host.base / "models/photomaker/photomaker-v1.bin")
        joined = {f"{part}.{name}": weight for part, named in parts.items() for name, weight in named.items()}
        save_file(joined, host.base / "models/photomaker/photomaker-v1.safetensors")
        lora = {name: weight.contiguous() for name, weight in parts["lora_weights"].items()}
        save_file(lora, host.base / "models/loras/photomaker.safetensors")
    yield parts
    vision.update(whole)


@pytest.fixture(scope="module")
def maker(host, file):
    with torch.inference_mode():
        return host.run("MoAFromPhotoMaker", "photomaker-v1.bin")[0]


def picture(seed: int) -> torch.Tensor:
    return torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(seed))


def person(host, maker, *seeds: int, word="man", **widgets):
    return host.run("MoASubjectEncoder", maker, torch.cat(list(map(picture, seeds))), word, **widgets)[0]


def own_text(conditioning) -> torch.Tensor:
    text, extra = conditioning[0]
    return extra[KEY].as_in(text).own_texts[0].texts[0]


def close(ours: torch.Tensor, theirs: torch.Tensor, plain: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() < 1e-5 * (theirs - plain).abs().max()


def test_over_the_whole_picture_it_is_comfyuis_own_photomaker_and_its_lora(host, sdxl, file, maker):
    """One photo: the text is what ComfyUI's encoder makes of it, the picture that of Load LoRA with that text."""
    import comfy.clip_vision

    model, clip = sdxl[1]
    subject = person(host, maker, 1, area=EVERYWHERE)
    patched, bound = host.patch(model, clip, maker, subject)
    positive, negative, plain = host.prompt(bound, PROMPT), host.prompt(clip, "ugly"), host.prompt(clip, PROMPT)
    loader = host.run("PhotoMakerLoader", "photomaker-v1.bin")[0]
    pixels = comfy.clip_vision.clip_preprocess(picture(1))
    fused = torch.arange(77)[None] == 2  # `man`
    theirs = loader(pixels[None], plain[0][0].clone(), fused)
    close(own_text(positive), theirs, plain[0][0])
    assert torch.equal(positive[0][0], plain[0][0])

    changed = host.run("LoraLoader", model, clip, "photomaker.safetensors", 1.0, 0.0)[0]
    theirs = [[theirs, plain[0][1]]]  # the pooled vector is all people's
    pictures = [
        host.sample(each, text, negative, steps=2)["samples"]
        for each, text in ((patched, positive), (changed, theirs), (model, plain))
    ]
    effect = (pictures[1] - pictures[2]).abs().max()
    difference = float((pictures[0] - pictures[1]).abs().max() / effect)
    print(f"{difference:.1e} of the effect {effect:.2f}")
    assert effect > 0.1 and difference < 1e-4
    loaded = host.run("MoAFromPhotoMaker", "photomaker-v1.safetensors")[0]
    assert loaded.encoder == maker.encoder and loaded.lora.weights.keys() == maker.lora.weights.keys()


@pytest.mark.parametrize(
    ("prompt", "repeated", "places"),
    [
        (PROMPT, "a man man in paris", [2, 3]),
        ("a (man:1.3) in paris", "a (man man:1.3) in paris", [2, 3]),
        ("a house, " * 24 + "a tall man", "a house, " * 24 + "a tall man man", [75, 78]),
        ("a house, " * 30 + "a man", "a house, " * 30 + "a man man", [94, 95]),
    ],
)
def test_of_two_photos_the_word_stands_twice_and_each_is_fused_with_one(
    host, sdxl, file, maker, prompt, repeated, places
):
    """By ComfyUI's own fusion; in the first chunk of the prompt, across two, and in the second."""
    import comfy.ops

    fusion = of_comfyui(host)["FuseModule"](2048, comfy.ops.manual_cast)
    begin = "fuse_module."
    fusion.load_state_dict({n[len(begin) :]: w for n, w in file["id_encoder"].items() if n.startswith(begin)})
    subject = person(host, maker, 1, 2)
    bound = host.patch(*sdxl[1], maker, subject)[1]
    plain = host.prompt(sdxl[1][1], repeated)[0][0]
    expected = plain.clone()
    identities = torch.cat([person(host, maker, seed).features for seed in (1, 2)])
    torch.testing.assert_close(subject.features, identities.flatten()[None])
    expected[0, places] = fusion.fuse_fn(plain[0, places], identities)
    close(own_text(host.prompt(bound, prompt)), expected, plain)


class Latents(torch.nn.Module):
    """An autoencoder that shows what it is given to decode: a random one's pictures are black and white."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        self.drawn = latents
        return latents


def test_a_picture_of_two_photos_sampled_in_diffusers_is_comfyuis(host, sdxl, file, maker):
    """In float64: in float32 the two U-Nets differ by as much as is asked for with nobody in the picture."""
    from moa_core.adapters.photomaker_file import photomaker_of
    from moa_core.subjects.subject import Subject
    from training.host.base import Base
    from training.host.pipeline import MoAPipeline

    subject = person(host, maker, 1, 2, area=EVERYWHERE, weight=0.8)
    model, clip = narrow_model(sdxl[0], torch.float64), sdxl[1][1]
    patched, bound = host.patch(model, clip, maker, subject)
    positive, negative = host.prompt(bound, PROMPT), host.prompt(clip, "ugly")
    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    theirs = [
        host.run("KSampler", each, 3, 1, 4.0, "euler", "simple", positive, negative, latent)[0]["samples"]
        for each in (patched, model)
    ]
    theirs, plain = map(model.model.process_latent_in, theirs)
    with torch.inference_mode(False):
        unet = copy.deepcopy(sdxl[0]).double()
    unet.register_to_config(sample_size=16)
    outside = photomaker_of("file", {f"{part}.{n}": w for part, named in file.items() for n, w in named.items()})
    own = Subject(subject.features, subject.word, subject.name, subject.weight, subject.area)
    base = Base(unet, texts_outside(clip).double(), Latents(), "SDXL")
    pipeline = MoAPipeline(base, outside)
    pipeline.photo_deltas.double()
    sigma = float(model.get_model_object("model_sampling").sigma_max)
    start = (1 + sigma**2) ** 0.5 * torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3)).double()
    pipeline(PROMPT, [own], "ugly", sampler="euler", start=start, steps=1, cfg=4.0)
    effect = (theirs - plain).norm()
    difference = float((base.autoencoder.drawn - theirs).norm() / effect)
    print(f"{difference:.1e} of the effect {effect:.2f}")
    assert effect > 1 and difference < 1e-5


def test_the_report_tells_who_stands_where(host, sdxl, maker):
    """Each in their place, and the other in each one's; one of them is known from two photos."""
    patches = torch.rand(2, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    ann, bob = F.interpolate(patches, 64, mode="bilinear").movedim(1, -1).split(1)
    left, right = torch.zeros(1, 32, 32), torch.zeros(1, 32, 32)
    left[:, 8:22, 1:15], right[:, 8:22, 17:31] = 1, 1
    people = [
        host.run("MoASubjectEncoder", maker, photos, word, area=area)[0]
        for photos, word, area in ((torch.cat([ann, 0.8 * ann]), "man", left), (bob, "woman", right))
    ]
    model, clip = host.patch(*sdxl[1], maker, *people)
    texts = host.prompt(clip, "a man and a woman in paris"), host.prompt(clip, "ugly")
    latents = host.sample(model, *texts, steps=1, batch=2)
    told, _ = report_of_pasted(host, model, latents, (ann, bob), (bob, ann))
    own, other = ([found["likeness"] for found in picture["subjects"]] for picture in told["pictures"])
    assert own[1] > 0.98 and all(here > there + 0.02 for here, there in zip(own, other, strict=True))
    assert told["best"] == 1


def test_a_maker_a_lora_and_weights_each_count_and_a_saved_one_is_the_same(host, sdxl, file, maker):
    """A morph's frames read texts of their own."""
    model, clip = sdxl[1]
    save_file(random_lora(model, None, 2, scale=0.05), host.base / "models/loras/beside-maker.safetensors")
    left, right = torch.zeros(1, 32, 32), torch.zeros(1, 32, 32)
    left[..., :14], right[..., 18:] = 1, 1
    man = person(host, maker, 1, area=left)
    lora = host.run("MoALoRASubject", "beside-maker.safetensors", "woman", area=right)[0]

    def run(*people, batch=1):
        patched, bound = host.patch(model, clip, maker, *people)
        texts = host.prompt(bound, "a man and a woman in paris"), host.prompt(clip, "ugly")
        latent = {"samples": torch.zeros(batch, 4, 16, 16), "batch_index": [0] * batch}
        return host.sample(patched, *texts, steps=1, latent=latent)["samples"]

    alone = run(man)
    assert (run(man, lora) - alone).abs().max() > 1e-2
    saved = host.nodes["MoASaveSubject"].execute(man, "maker").ui["subjects"][0]["filename"]
    again = host.run("MoALoadSubject", saved)[0]
    assert again.encoder == maker.encoder and torch.equal(again.features, man.features)
    plain = host.sample(model, host.prompt(clip, "a man and a woman in paris"), host.prompt(clip, "ugly"), steps=1)
    assert torch.equal(run(person(host, maker, 1, weight=0.0)), plain["samples"])
    morph = host.run("MoASubjectInterpolate", man, person(host, maker, 2, area=left), 0.5, 2, "linear")[0]
    frames = run(morph, batch=2)
    assert (frames[0] - alone[0]).abs().max() < 1e-3 * alone.abs().max()
    assert (frames[0] - frames[1]).abs().max() > 1e-2


def test_other_files_and_checkpoints_are_refused_in_a_sentence(host, loaded, sdxl, file, maker):
    folder = host.base / "models/photomaker"

    def load(parts, name):
        torch.save(parts, folder / f"{name}.bin")
        return host.run("MoAFromPhotoMaker", f"{name}.bin")

    encoder, lora = file["id_encoder"], file["lora_weights"]
    second = {"id_encoder": encoder | {"qformer_perceiver.token_norm.weight": torch.ones(2)}, "lora_weights": lora}
    with pytest.raises(ValueError, match="'second.bin' is PhotoMaker of version 2.*photomaker-v1"):
        load(second, "second")
    with pytest.raises(ValueError, match="'half.bin' is no PhotoMaker file: expected weights named id_encoder"):
        load({"id_encoder": encoder, "other": {}}, "half")
    less = {name: weight for name, weight in encoder.items() if name != "fuse_module.mlp1.fc1.bias"}
    with pytest.raises(ValueError, match="'less.bin' is damaged.*fuse_module.mlp1.fc1.bias"):
        load({"id_encoder": less, "lora_weights": lora}, "less")
    (folder / "cut.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="'cut.bin' is damaged, or a pickle of more than tensors"):
        host.run("MoAFromPhotoMaker", "cut.bin")
    with pytest.raises(ValueError, match=r"'photomaker-v1\.bin' is for SDXL \(70 .*this MODEL is MoAToy"):
        host.patch(*loaded[:2], maker, host.run("MoASubjectEncoder", maker, photo(), "man")[0])
