"""FaceID files in a real ComfyUI: from a photo with a face to the picture, alone and beside a LoRA."""

import copy
import dataclasses
import importlib
import os
import pickle

import pytest
import torch
from conftest import unsaturated
from face_pictures import FaceFinder, embedding, photo
from image_experts import PROMPT, face_adapter
from lora_files import random_lora
from safetensors.torch import save_file
from test_report import report_of_pasted

from tests.host.test_ip_adapter import outside
from toy_world.shape import IMAGE_SIZE

ANN, BOB = (40, 20, 30, 40), (200, 90, 10, 20)
"""Two faces: who, where, and how large."""


@pytest.fixture(scope="module")
def plusv2(host, toy_base, tmp_path_factory):
    with torch.inference_mode():
        return face_adapter(
            host, toy_base.unet, tmp_path_factory.mktemp("faces"), "faceid-plusv2", "ip-adapter-faceid-plusv2_sd15"
        )


@pytest.fixture(scope="module")
def portrait(host, toy_base, tmp_path_factory):
    with torch.inference_mode():
        return face_adapter(
            host, toy_base.unet, tmp_path_factory.mktemp("faces"), "portrait", "ip-adapter-faceid-portrait_sd15"
        )


def normed(who: int) -> torch.Tensor:
    """[1, 512]."""
    found = torch.tensor(embedding(who))[None]
    return found / found.norm()


def encoded(host, moa, picture, word="man", **widgets):
    return host.run("MoASubjectEncoder", moa, picture, word, **widgets)[0]


def test_a_subject_is_its_photos_tokens_one_after_the_other(host, portrait):
    """The largest face of each photo; one in the mask where there is a mask; one that fills the photo as well."""
    projector, count = portrait.adapter.projector, portrait.feature_dim
    both = encoded(host, portrait, torch.cat([photo(BOB, ANN), photo(BOB)]))
    assert both.features.shape == (1, 2 * count)
    torch.testing.assert_close(both.features[:, :count], projector(normed(ANN[0])).flatten(1))
    torch.testing.assert_close(both.features[:, count:], projector(normed(BOB[0])).flatten(1))
    mask = torch.zeros(1, 96, 128)
    mask[:, :, 80:] = 1
    torch.testing.assert_close(encoded(host, portrait, photo(BOB, ANN), mask=mask).features, both.features[:, count:])
    large = encoded(host, portrait, photo((BOB[0], 2, 2, 90)))
    torch.testing.assert_close(large.features, both.features[:, count:])


def test_plus_sees_the_face_upright_through_clip_as_well_and_the_preview_shows_it(host, plusv2):
    out = host.nodes["MoASubjectEncoder"].execute(plusv2, photo(ANN, BOB), "man")
    crop = plusv2.prepare(photo(ANN)[0], None).crop
    assert (
        crop.shape == (224, 224, 3) and (crop[60:160, 60:160] - torch.tensor([1, ANN[0] / 255, 0])).abs().max() < 1e-5
    )
    seen = plusv2.clip_vision.encode_image(crop[None]).penultimate_hidden_states
    torch.testing.assert_close(out.result[0].features, plusv2.adapter.projector(normed(ANN[0]), seen).flatten(1))
    (shown,) = out.ui.as_dict()["images"]
    assert shown["type"] == "temp"


def test_no_face_and_several_are_said_and_no_face_at_all_is_refused(host, portrait, caplog):
    encoded(host, portrait, torch.cat([photo(ANN), photo(), photo(ANN, BOB)]))
    assert "No face in picture 2: left out." in caplog.text
    assert "Several faces in picture 3: the largest is taken." in caplog.text
    with pytest.raises(
        ValueError, match=r"no face in the picture of 'woman', and 'ip-adapter-faceid-portrait_sd15\.bin'"
    ):
        encoded(host, portrait, photo(), "woman")
    mask = torch.zeros(1, 96, 128)
    mask[:, 90:, :10] = 1
    with pytest.raises(ValueError, match="or none in the mask"):
        encoded(host, portrait, photo(ANN), mask=mask)


def drawn(host, loaded, moa, *people, prompt=PROMPT, **widgets):
    model, clip = host.patch(*loaded[:2], moa, *people, **widgets)
    return host.sample(model, host.prompt(clip, prompt), host.prompt(loaded[1], "ugly"), steps=3)["samples"]


@pytest.mark.parametrize(("family", "ratio"), [("SD 1.5", 2.0), ("SDXL", 1.0)])
def test_a_lora_and_a_face_are_each_themselves_and_weight_0_is_not_one_bit(
    host, loaded, toy_base, sdxl, tmp_path, family, ratio
):
    """Either changes most what is on its side, by that ratio: SDXL's many random layers carry it on."""
    unet, models = (toy_base.unet, loaded) if family == "SD 1.5" else sdxl
    moa = face_adapter(host, unet, tmp_path, "faceid", f"ip-adapter-faceid_{family.lower().replace(' ', '')}")
    save_file(random_lora(*models[:2], 1, scale=0.05), host.base / "models/loras/beside.safetensors")
    left, right = torch.zeros(1, 32, 32), torch.zeros(1, 32, 32)
    left[..., :12], right[..., 20:] = 1, 1
    lora = host.run("MoALoRASubject", "beside.safetensors", "woman", area=right)[0]
    face = encoded(host, moa, photo(ANN), area=left)

    def run(*people):
        model, clip = host.patch(*models[:2], moa, *people)
        return host.sample(model, host.prompt(clip, PROMPT), host.prompt(models[1], "ugly"), steps=1)["samples"]

    plain = host.sample(models[0], host.prompt(models[1], PROMPT), host.prompt(models[1], "ugly"), steps=1)["samples"]
    together, others = run(face, lora), [run(lora), run(face)]
    by_column = [(other - plain).abs().mean(dim=(0, 1, 2)) for other in others]
    assert by_column[0][10:].mean() > ratio * by_column[0][:6].mean() > 0
    assert by_column[1][:6].mean() > ratio * by_column[1][10:].mean() > 0
    assert min((together - other).abs().max() for other in others) > 1e-2
    assert torch.equal(run(encoded(host, moa, photo(ANN), weight=0.0)), plain)


@pytest.fixture(scope="module")
def instantid(host, toy_base, tmp_path_factory):
    """For the toy model; its projector reads embeddings that are not normalized."""
    with torch.inference_mode():
        return face_adapter(host, toy_base.unet, tmp_path_factory.mktemp("faces"), "unnorm", "report-instantid")


@pytest.mark.parametrize("kind", ["portrait", "plusv2", "instantid"])
def test_the_report_tells_by_the_face_who_stands_where(host, loaded, request, kind):
    """By the cosines of insightface's embeddings: each in their place, the other in each one's, nobody with a face.

    One is known from two photos that differ, the other comes from a file.
    """
    moa, ann, bob, later = request.getfixturevalue(kind), photo(ANN), photo((BOB[0], 50, 20, 40)), ANN[0] + 1
    left, right = torch.zeros(1, 32, 32), torch.zeros(1, 32, 32)
    left[:, 8:22, 1:15], right[:, 8:22, 17:31] = 1, 1
    first = encoded(host, moa, torch.cat([ann, photo((later, 60, 30, 30))]), area=left)
    second = encoded(host, moa, bob, "woman", area=right)
    saved = host.nodes["MoASaveSubject"].execute(second, f"bob-{kind}").ui["subjects"][0]["filename"]
    model, clip = host.patch(*loaded[:2], moa, first, host.run("MoALoadSubject", saved)[0])
    latents = host.sample(model, host.prompt(clip, PROMPT), host.prompt(clip, "ugly"), steps=1, batch=3)
    told, text = report_of_pasted(host, model, latents, (ann, bob), (bob, ann), (photo(), photo()))
    own, other, nobody = ([found["likeness"] for found in picture["subjects"]] for picture in told["pictures"])
    to_ann, to_bob = (lambda who, one=one: float(normed(who)[0] @ normed(one)[0]) for one in (ANN[0], BOB[0]))
    assert own == pytest.approx([(1 + to_ann(later)) / 2, 1.0], abs=1e-5)
    assert other == pytest.approx([(to_bob(ANN[0]) + to_bob(later)) / 2, to_ann(BOB[0])], abs=1e-5)
    assert nobody == [None, None] and told["best"] == 1
    assert {subject["likeness_by"] for subject in told["subjects"]} == {"face embedding"}
    assert "likeness 1.000 by face embedding" in text and text.count("likeness not measured: no face is seen") == 2


def test_a_picture_with_a_face_and_a_lora_sampled_in_diffusers_is_comfyuis(host, loaded, toy_base, plusv2):
    from moa_core.adapters.deltas import deltas_of
    from moa_core.adapters.ip_adapter_file import IPAdapter
    from moa_core.adapters.run import Adapters
    from moa_core.subjects.subject import Subject
    from training.host.lora import face_lora, read_lora
    from training.host.pipeline import MoAPipeline

    name = "unet-1.safetensors"
    save_file(random_lora(loaded[0], None, 1), host.base / "models/loras" / name)
    left, right = torch.zeros(1, 32, 32), torch.zeros(1, 32, 32)
    left[..., :14], right[..., 18:] = 1, 1
    face = encoded(host, plusv2, photo(ANN), "man", area=left)
    people = [face, host.run("MoALoRASubject", name, "woman", area=right)[0]]
    model, clip = host.patch(*loaded[:2], plusv2, *people)
    positive, negative = host.prompt(clip, PROMPT), host.prompt(clip, "ugly")
    latent = {"samples": torch.zeros(1, 4, IMAGE_SIZE // 8, IMAGE_SIZE // 8)}
    theirs = [
        host.run("KSampler", each, 3, 4, 4.0, "euler", "simple", positive, negative, latent)[0]["samples"]
        for each in (model, loaded[0])
    ]
    with torch.inference_mode(False):
        base = unsaturated(copy.deepcopy(toy_base))
    theirs, plain = (((base.autoencoder.decode(x) + 1) / 2).clamp(0, 1).movedim(1, -1) for x in theirs)
    inside = plusv2.adapter
    adapter = IPAdapter(outside(plusv2), inside.projector, inside.changes)
    own = [Subject(s.features, s.word, s.name, s.weight, s.area) for s in people]
    files = [face_lora(base.unet, adapter), read_lora(base.unet, host.base / "models/loras" / name)]
    adapters = Adapters({own[0]: adapter.mixture}, {own[0]: [0], own[1]: [1]}, deltas_of(base.unet, files))
    ours = MoAPipeline(base, adapters=adapters)(PROMPT, own, "ugly", sampler="euler", seed=3, steps=4, cfg=4.0)[0]
    difference, effect = (ours - theirs).abs(), (theirs - plain).abs().max().item()
    apart = (difference > 2 / 255).float().mean().item()
    print(f"max abs difference {difference.max():.1e} of the effect {effect:.2f}; {apart:.2%} over 2 / 255")
    assert apart <= 0.01 and effect > 0.1
    alone = MoAPipeline(base, adapter)(PROMPT, own[:1], "ugly", sampler="euler", seed=3, steps=1, cfg=4.0)[0]
    both = Adapters({own[0]: adapter.mixture}, {own[0]: [0]}, deltas_of(base.unet, files[:1]))
    again = MoAPipeline(base, adapters=both)(PROMPT, own[:1], "ugly", sampler="euler", seed=3, steps=1, cfg=4.0)[0]
    assert torch.equal(alone, again)


def test_saved_and_loaded_it_draws_the_same_picture_and_only_for_its_own_file(host, loaded, portrait, plusv2):
    """Of two photos, and of one beside another person of the same file."""
    subject = encoded(host, portrait, torch.cat([photo(ANN), photo(BOB)]))
    saved = host.nodes["MoASaveSubject"].execute(subject, "face").ui["subjects"][0]["filename"]
    again = host.run("MoALoadSubject", saved)[0]
    other = encoded(host, portrait, photo(BOB), "woman")
    assert torch.equal(drawn(host, loaded, portrait, subject, other), drawn(host, loaded, portrait, again, other))
    assert not torch.equal(drawn(host, loaded, portrait, subject), drawn(host, loaded, portrait, other))
    with pytest.raises(
        ValueError, match=r"'ip-adapter-faceid-portrait_sd15\.bin'.*'ip-adapter-faceid-plusv2_sd15\.bin'"
    ):
        host.patch(*loaded[:2], plusv2, again)


class Recognizer:
    model_file = "/models/antelopev2/glintr100.onnx"


class Antelope(FaceFinder):
    models = {"recognition": Recognizer()}


class DetectorAlone(FaceFinder):
    models = {"detection": None}


class Doubting(FaceFinder):
    """Judges every face not real, and embeds none."""

    def get(self, picture):
        return [dataclasses.replace(face, embedding=None) for face in super().get(picture)]


def test_what_is_missing_or_wrong_is_said_in_a_sentence(host, toy_base, tmp_path, plusv2, portrait):
    def load(name, *inputs):
        return host.run("MoAFromIPAdapter", f"{name}.bin", *inputs)[0]

    with pytest.raises(
        ValueError,
        match="plusv2_sd15.bin' reads a CLIP vision model CLIP.*48 wide.*Load CLIP Vision|"
        "plusv2_sd15.bin' reads a CLIP vision model one with hidden states 48 wide",
    ):
        load("ip-adapter-faceid-plusv2_sd15", None, FaceFinder())
    with pytest.raises(ValueError, match="portrait_sd15.bin'.*the Python package `insightface` is not installed"):
        load("ip-adapter-faceid-portrait_sd15")
    with pytest.raises(ValueError, match="insightface is a str without insightface's `get`"):
        load("ip-adapter-faceid-portrait_sd15", None, "faces")
    with pytest.raises(ValueError, match="insightface's buffalo_l, and the INSIGHTFACE.*uses glintr100"):
        load("ip-adapter-faceid-portrait_sd15", None, Antelope())
    with pytest.raises(ValueError, match="connected here lacks the model that makes them, w600k_r50. Choose all of bu"):
        load("ip-adapter-faceid-portrait_sd15", None, DetectorAlone())
    with pytest.raises(ValueError, match="there is no face in the picture of 'man'"):
        encoded(host, load("ip-adapter-faceid-portrait_sd15", None, Doubting()), photo(ANN))
    folder = host.base / "models/ipadapter"
    (folder / "cut.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"'cut\.bin' is damaged, or a pickle of more than tensors"):
        load("cut")
    torch.save({"conv.weight": torch.ones(2), "steps": {"count": torch.ones(1)}}, folder / "network.bin")
    with pytest.raises(ValueError, match=r"'network\.bin' is no IP-Adapter for a U-Net: expected weights named"):
        load("network")
    torch.save({"image_proj": {"proj.weight": 3}, "ip_adapter": {"1.to_k_ip.weight": torch.ones(2)}}, folder / "3.bin")
    with pytest.raises(ValueError, match=r"'3\.bin' is damaged, or a pickle of more than tensors"):
        load("3")
    written = tmp_path / "ran"

    class Command:
        def __reduce__(self):
            return os.mkdir, (str(written),)

    (folder / "hostile.bin").write_bytes(pickle.dumps({"image_proj": Command(), "ip_adapter": {}}))
    with pytest.raises(ValueError, match=r"'hostile\.bin' is damaged, or a pickle of more than tensors.*not read"):
        load("hostile")
    assert not written.exists()


def test_an_installed_insightface_is_asked_with_models_from_the_models_folder_alone(
    host, toy_base, portrait, tmp_path, monkeypatch
):
    (tmp_path / "insightface").mkdir()
    (tmp_path / "insightface/__init__.py").touch()
    app = tmp_path / "insightface/app.py"
    app.write_text("import a_package_that_is_not_there\n")
    app_that_works = (
        "from pathlib import Path\n"
        "from face_pictures import FaceFinder\n"
        "class FaceAnalysis(FaceFinder):\n"
        "    def __init__(self, name, root):\n"
        "        assert Path(root, 'models', name, 'det_10g.onnx').exists()\n"
        "        self.name, self.root = name, root\n"
        "    def prepare(self, ctx_id, det_size):\n"
        "        self.det_size = det_size\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"no \.onnx file in models/insightface/models/buffalo_l"):
        host.run("MoAFromIPAdapter", "ip-adapter-faceid-portrait_sd15.bin")
    models = host.base / "models/insightface/models/buffalo_l"
    models.mkdir(parents=True)
    (models / "w600k_r50.onnx").touch()
    with pytest.raises(ValueError, match=r"insightface, which lacks something .*a_package_that.*Install it with what"):
        host.run("MoAFromIPAdapter", "ip-adapter-faceid-portrait_sd15.bin")
    app.write_text(app_that_works)
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match=r"cannot use the files in .*buffalo_l \(Assertion.*Put all files of insightf"):
        host.run("MoAFromIPAdapter", "ip-adapter-faceid-portrait_sd15.bin")
    (models / "det_10g.onnx").touch()
    moa = host.run("MoAFromIPAdapter", "ip-adapter-faceid-portrait_sd15.bin")[0]
    assert (moa.analysis.name, moa.analysis.root) == ("buffalo_l", str(host.base / "models/insightface"))
    assert moa.analysis.det_size == (640, 640)
    assert torch.equal(encoded(host, moa, photo(ANN)).features, encoded(host, portrait, photo(ANN)).features)
