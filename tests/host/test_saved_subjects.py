"""Save Subject and Load Subject in a real ComfyUI: a person is encoded once and used again without the photo."""

import dataclasses
import io
import json

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_http import cached, node

from tests.host.test_ip_adapter import adapter
from toy_world.shape import IMAGE_SIZE

NAME = "family/ann"
PROMPT = "a man in paris"


def save(host, subject, prefix=NAME) -> str:
    """Save a subject; the name under which Load Subject lists it."""
    saved = host.nodes["MoASaveSubject"].execute(subject, prefix)
    (file,) = saved.ui["subjects"]
    path = host.base / "output" / file["subfolder"] / file["filename"]
    assert path.is_file() and file["type"] == "output"
    name = str(path.relative_to(host.base / "output/moa_subjects"))
    assert name in options(host)
    return name


def options(host) -> list[str]:
    return host.nodes["MoALoadSubject"].define_schema().inputs[0].options


def draw(host, loaded, moa, subject, batch=1):
    model, clip = host.patch(loaded[0], loaded[1], moa, subject)
    return host.sample(model, host.prompt(clip, PROMPT), host.prompt(clip, ""), batch=batch)["samples"]


def half(host, moa, name: str, scale: float = 1.0):
    """MOA of a copy of the stirred MoA's file in float16, its image encoder's last matrix scaled."""
    source = host.base / "models/moa/moa-stirred.safetensors"
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    weights = load_file(source)
    weights["image_encoder.model.visual_projection.weight"] *= scale
    save_file({k: w.half() for k, w in weights.items()}, host.base / "models/moa" / name, metadata)
    return host.run("MoALoader", name)[0]


def test_a_loaded_subject_draws_the_same_picture_to_the_bit(host, loaded, moa):
    subject = host.subject(moa)
    again = host.run("MoALoadSubject", save(host, subject))[0]
    drawn = draw(host, loaded, moa, subject)
    assert torch.equal(drawn, draw(host, loaded, moa, again))
    assert not torch.equal(drawn, draw(host, loaded, moa, host.subject(moa, 1)))


def test_a_loaded_morph_of_image_tokens_keeps_its_frames_its_weight_and_its_area(host, loaded, toy_base, tmp_path):
    moa = adapter(host, toy_base.unet, tmp_path, "plus")
    area = torch.zeros(1, 128, 128)
    area[..., :64] = 1
    pictures = torch.rand(2, 1, 64, 64, 3)
    one, two = (host.run("MoASubjectEncoder", moa, p, "man", None, 0.6, area)[0] for p in pictures)
    morph = host.run("MoASubjectInterpolate", one, two, 0.5, 3, "linear")[0]
    again = host.run("MoALoadSubject", save(host, morph, "morph"))[0]
    drawn = draw(host, loaded, moa, morph, batch=3)
    assert torch.equal(drawn, draw(host, loaded, moa, again, batch=3))
    for changes in ({"weight": 1.0}, {"area": None}, {"features": again.features[:1]}):
        assert not torch.equal(drawn, draw(host, loaded, moa, dataclasses.replace(again, **changes), batch=3))


def test_a_loaded_subject_binds_to_another_word_if_one_is_entered(host, moa):
    name = save(host, host.subject(moa))
    assert host.run("MoALoadSubject", name, " woman ")[0].word == "woman"
    assert host.run("MoALoadSubject", name, " ")[0].word == "man"


def test_a_subject_of_another_image_encoder_is_refused_by_both_names(host, loaded, toy_base, moa, tmp_path):
    subject = host.run("MoALoadSubject", save(host, host.subject(moa)))[0]
    other = half(host, moa, "moa-finetuned.safetensors", scale=1.01)
    with pytest.raises(
        ValueError, match=r"subject0 .*'moa-stirred\.safetensors'.*'moa-finetuned\.safetensors'.*Encode"
    ):
        host.patch(loaded[0], loaded[1], other, subject)
    host.patch(loaded[0], loaded[1], half(host, moa, "moa-half.safetensors"), subject)
    plus = adapter(host, toy_base.unet, tmp_path, "plus")
    person = host.run("MoASubjectEncoder", plus, torch.rand(1, 64, 64, 3), "man")[0]
    host.patch(loaded[0], loaded[1], moa, person)  # a fresh one brings its own experts along, a saved one does not
    person = host.run("MoALoadSubject", save(host, person))[0]
    with pytest.raises(ValueError, match=r"'plus\.safetensors'.*'moa-stirred\.safetensors'"):
        host.patch(loaded[0], loaded[1], moa, person)
    with pytest.raises(ValueError, match=r"'plus\.safetensors'.*'moa-stirred\.safetensors'"):
        host.run("MoASubjectInterpolate", person, subject, 0.5, 1, "linear")
    seen_otherwise = adapter(host, toy_base.unet, tmp_path, "plus", "sharp", num_hidden_layers=4)
    with pytest.raises(ValueError, match=r"'plus\.safetensors'.*'sharp\.safetensors'"):
        host.patch(loaded[0], loaded[1], seen_otherwise, person)


def test_a_new_file_never_takes_the_name_of_another(host, moa):
    first, second = (save(host, host.subject(moa, seed), "bob") for seed in (1, 2))
    assert (first, second) == ("bob_00001_.safetensors", "bob_00002_.safetensors")
    models = host.base / "models/moa_subjects"
    models.mkdir(exist_ok=True)
    (host.base / "output/moa_subjects" / second).rename(models / second)
    before = host.run("MoALoadSubject", second)[0]
    assert torch.equal(before.features, host.subject(moa, 2).features)
    assert save(host, host.subject(moa, 3), "bob") == "bob_00003_.safetensors"


@pytest.mark.parametrize("prefix", ["", ".", "..", "../ann", "family/../../ann", "/tmp/ann", "out/ann"])
def test_nothing_is_written_anywhere_else(host, moa, tmp_path, prefix):
    folder = host.base / "output/moa_subjects"
    folder.mkdir(exist_ok=True)
    if not (folder / "out").is_symlink():
        (folder / "out").symlink_to(tmp_path)
    subject = host.subject(moa)
    before = sorted(host.base.rglob("*"))
    sentence = host.nodes["MoASaveSubject"].validate_inputs(prefix)
    assert f"filename_prefix is '{prefix}': expected" in sentence and "Enter a name like ann" in sentence
    with pytest.raises(ValueError, match="Save Subject: filename_prefix is"):
        host.run("MoASaveSubject", subject, prefix)
    assert sorted(host.base.rglob("*")) == before and not list(tmp_path.iterdir())


def test_nothing_is_read_from_anywhere_else(host, moa, tmp_path):
    name = save(host, host.subject(moa))
    folder = host.base / "output/moa_subjects"
    secret = tmp_path / "secret.safetensors"
    secret.write_bytes((folder / name).read_bytes())
    (folder / "link.safetensors").symlink_to(secret)
    (folder / "dangling.safetensors").symlink_to(tmp_path / "gone")
    (folder / "notes.txt").write_text("no subject")
    (folder / "unfinished-123-ann_00001_.safetensors").write_bytes(b"half")
    beside = "../moa_subjects/" + name
    for wanted in (beside, "../" * 9 + str(secret)[1:], str(secret), "link.safetensors", "dangling.safetensors",
                   "notes.txt", "unfinished-123-ann_00001_.safetensors", "", "gone.safetensors"):  # fmt: skip
        sentence = host.nodes["MoALoadSubject"].validate_inputs(wanted)
        assert f"'{wanted}'" in sentence and "moa_subjects" in sentence
        with pytest.raises(ValueError, match="Load Subject: "):
            host.run("MoALoadSubject", wanted)
    assert host.nodes["MoALoadSubject"].validate_inputs(name) is True
    assert not {"notes.txt", "unfinished-123-ann_00001_.safetensors"} & set(options(host))
    (folder / name).write_bytes(b"<html>")
    with pytest.raises(ValueError, match=r"Load Subject: 'ann_\d+_\.safetensors' cannot be read.*6 bytes"):
        host.run("MoALoadSubject", name)


def graph(toy_seed: int | None = None, subject_name: str = "") -> dict:
    """Toy Subject encoded and saved, or loaded; MoA Patch Model, a picture of few steps."""
    nodes = {
        "base": node("CheckpointLoaderSimple", ckpt_name="moa-toy-base.safetensors"),
        "moa": node("MoALoader", moa_name="moa-toy.safetensors"),
        "patch": node("MoAPatchModel", model=["base", 0], clip=["base", 1], moa=["moa", 0], strength=1.0,
                      start_percent=0.0, end_percent=1.0, routing="sparse", **{"subjects.subject0": ["subject", 0]}),
        "prompt": node("CLIPTextEncode", clip=["patch", 1], text="a man on a beach"),
        "latent": node("EmptyLatentImage", width=IMAGE_SIZE, height=IMAGE_SIZE, batch_size=1),
        "sample": node("KSampler", model=["patch", 0], positive=["prompt", 0], negative=["prompt", 0], seed=1, steps=2,
                       latent_image=["latent", 0], cfg=1.0, sampler_name="euler", scheduler="normal", denoise=1.0),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["base", 2]),
        "picture": node("PreviewImage", images=["decode", 0]),
    }  # fmt: skip
    if toy_seed is None:
        return nodes | {"subject": node("MoALoadSubject", subject_name=subject_name)}
    return nodes | {
        "toy": node("MoAToySubject", seed=toy_seed, pose="standing", word="man"),
        "subject": node("MoASubjectEncoder", moa=["moa", 0], image=["toy", 0], mask=["toy", 1], word="man"),
        "save": node("MoASaveSubject", subject=["subject", 0], filename_prefix="http"),
    }


def picture(server, entry) -> bytes:
    """Its pixels; the PNG holds the graph as well."""
    return Image.open(io.BytesIO(server.pictures(entry, "picture")[0])).tobytes()


def test_over_http_a_saved_subject_is_listed_loaded_and_loaded_anew_when_its_file_changes(fresh_server):
    saved = [fresh_server.queue(graph(seed)) for seed in (1, 2)]
    files = [entry["outputs"]["save"]["subjects"][0] for entry in saved]
    assert files[0] == {"filename": "http_00001_.safetensors", "subfolder": "moa_subjects", "type": "output"}
    info = fresh_server.get("/object_info/MoALoadSubject")["MoALoadSubject"]
    name = files[0]["filename"]
    assert info["input"]["required"]["subject_name"][1]["options"] == [file["filename"] for file in files]
    shown = [picture(fresh_server, entry) for entry in saved]
    assert shown[0] != shown[1]
    entry = fresh_server.queue(graph(subject_name=name))
    assert picture(fresh_server, entry) == shown[0]
    assert "subject" in cached(fresh_server.queue(graph(subject_name=name)))
    folder = fresh_server.base / "output/moa_subjects"
    (folder / files[1]["filename"]).replace(folder / name)
    entry = fresh_server.queue(graph(subject_name=name))
    assert "subject" not in cached(entry) and picture(fresh_server, entry) == shown[1]
    with pytest.raises(RuntimeError, match=r"refused .*there is no subject 'http_00002_\.safetensors'"):
        fresh_server.queue(graph(subject_name=files[1]["filename"]))
    away = {name: graph(3)[name] for name in ("moa", "toy", "subject", "save")}
    away["save"]["inputs"]["filename_prefix"] = "../http"
    with pytest.raises(RuntimeError, match="refused .*filename_prefix is '../http'"):
        fresh_server.queue(away)


def test_a_saved_file_says_what_it_is_and_holds_no_photo_and_no_workflow(fresh_server):
    fresh_server.queue(graph(5))
    path = max((fresh_server.base / "output/moa_subjects").glob("http_*"), key=lambda p: p.stat().st_mtime)
    with safe_open(path, "pt") as file:
        metadata, names = file.metadata(), list(file.keys())
    assert names == ["features"]
    assert metadata.pop("image_encoder") and metadata == {
        "format": "moa-subject", "format_version": "1", "word": "man", "name": "man", "weight": "1.0",
        "moa": "moa-toy.safetensors",
    }  # fmt: skip
    assert path.stat().st_size < 2000, json.dumps(metadata)


def test_a_prefix_with_a_date_and_folders_of_another_system(host, moa):
    import time

    before, name, after = time.localtime(), save(host, host.subject(moa), "by\\%date:yyyy-MM-dd%"), time.localtime()
    days = {time.strftime("by/%Y-%m-%d_00001_.safetensors", when) for when in (before, after)}
    assert name in days
    elsewhere = name.replace("/", "\\")  # as a graph says that was saved on Windows
    assert host.nodes["MoALoadSubject"].validate_inputs(elsewhere) is True
    assert torch.equal(host.run("MoALoadSubject", elsewhere)[0].features, host.subject(moa).features)


@pytest.mark.parametrize("prefix", ["ann:1", "ann?", "family/con", "nul.x", "ann.", "a /ann", "%date:hh:mm%", "a\tb"])
def test_names_that_no_windows_can_have_are_refused_everywhere(host, moa, prefix):
    sentence = host.nodes["MoASaveSubject"].validate_inputs(prefix)
    assert f"filename_prefix is '{prefix}'" in sentence and "Windows" in sentence
    with pytest.raises(ValueError, match="Save Subject: filename_prefix is"):
        host.run("MoASaveSubject", host.subject(moa), prefix)
