"""The paper's evaluation, on the toy models that ship with the pack; its FaceNet goes by colour, its CLIP is random."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from planted_models import CLIP_TEXT, CLIP_VISION, make_facenet, make_faint_base
from toy_run import config, finish, start
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPVisionConfig, CLIPVisionModel

from toy_world.draw import draw_person
from toy_world.shape import IMAGE_SIZE
from toy_world.world import sample_identity
from training.evaluate import main
from training.evaluation.faces import FaceJudge, identity_preservation
from training.evaluation.references import ReferencePerson, read_people
from training.evaluation.shots import PLACEHOLDER, Shot, plan
from training.evaluation.statistics import interval, ratio_interval
from training.finetune.loop import train
from training.host.tokenizer import clip_tokenizer, tokenize

MODELS = Path(__file__).parent.parent / "models"
FACES = {"ann": 27, "bob": 16}
"""MTCNN is sure that these toy people's faces are faces, large and small, and that FACELESS's is none."""
FACELESS = 2


def portrait(seed: int) -> tuple[Image.Image, Image.Image]:
    """A toy person and their mask."""
    word = ("man", "woman")[seed % 2]
    picture, mask = draw_person(sample_identity(np.random.default_rng(seed), word, "adult"), word)
    return picture, Image.fromarray(mask)


@pytest.fixture(scope="module")
def judges(tmp_path_factory) -> Path:
    """facenet.safetensors as the published file, a tiny CLIP, and a base whose pictures show no face."""
    folder = tmp_path_factory.mktemp("judges")
    make_facenet(folder / "facenet.safetensors")
    make_faint_base(MODELS / "checkpoints/moa-toy-base.safetensors", folder / "base.safetensors")
    clip = CLIPModel(CLIPConfig(text_config=CLIP_TEXT, vision_config=CLIP_VISION, projection_dim=8))
    clip.save_pretrained(folder / "clip")
    size = {"height": 32, "width": 32}
    CLIPProcessor(CLIPImageProcessor(size=size, crop_size=size), clip_tokenizer()).save_pretrained(folder / "clip")
    CLIPVisionModel(CLIPVisionConfig(**CLIP_VISION)).save_pretrained(folder / "half")
    return folder


@pytest.fixture
def command(judges, tmp_path) -> dict[str, str]:
    """What the user gives: two people with a picture each, a prompt for one and a prompt for two."""
    for name, seed in FACES.items():
        folder = tmp_path / "subjects" / name
        folder.mkdir(parents=True)
        picture, mask = portrait(seed)
        picture.save(folder / "1.png")
        mask.save(folder / "1.mask.png")
    (tmp_path / "subjects/ann/word.txt").write_text("woman\n")
    (tmp_path / "prompts.txt").write_text("a <subject> on a beach\n\na <subject> and a <subject> in a park\n")
    return {
        "--base": str(judges / "base.safetensors"),
        "--moa": str(MODELS / "moa/moa-toy.safetensors"),
        "--subjects": str(tmp_path / "subjects"),
        "--prompts": str(tmp_path / "prompts.txt"),
        "--out": str(tmp_path / "out"),
        "--facenet": str(judges / "facenet.safetensors"),
        "--clip": str(judges / "clip"),
        "--images": "2",
        "--steps": "2",
    }


def run(command: dict[str, str], **changed) -> int:
    """A value of True is a switch; one of None leaves an option out."""
    options = command | {f"--{name.replace('_', '-')}": value for name, value in changed.items()}
    given = [[name] if value is True else [name, str(value)] for name, value in options.items() if value is not None]
    return main(["paper", *itertools.chain(*given)])


def test_an_evaluation_goes_on_where_it_was_and_scores_what_lies_there(command, capsys):
    out = Path(command["--out"])
    assert run(command, images=1) == 0
    first = {path: path.stat().st_mtime_ns for path in out.glob("*/*/*")}
    drawn = {path.relative_to(out).as_posix() for path in first if path.suffix == ".png"}
    pictures = ("ann/0-0.png", "bob/0-0.png", "ann+bob/1-0.png")
    assert drawn == {f"{row}/{picture}" for row in ("prior", "moa") for picture in pictures}
    # Nothing that was drawn has a face; the reference itself, in its place, is its subject to a hair.
    for row in json.loads((out / "result.json").read_text())["rows"].values():
        assert row["all"]["face_missing"] == 3
    moa = out / "moa"
    Image.open(Path(command["--subjects"]) / "ann/1.png").save(moa / "ann/0-0.png")
    (moa / "ann+bob/1-0.png").unlink()
    gone = (moa / "ann+bob/1-0.json").read_bytes()
    assert run(command) == 0

    assert (moa / "ann+bob/1-0.json").read_bytes() == gone  # drawn again, it is the same picture
    now = {path: path.stat().st_mtime_ns for path in out.glob("*/*/*")}
    changed = {path.relative_to(moa).as_posix() for path in first if now[path] != first[path]}
    assert changed == {"ann/0-0.png", "ann/0-0.json", "ann+bob/1-0.png"} and len(now) == 24
    for picture in pictures[:2]:  # the same noise, with and without the person
        assert (moa / picture).read_bytes() != (out / "prior" / picture).read_bytes()
    scores = {path.relative_to(moa).as_posix(): json.loads(path.read_text()) for path in moa.glob("*/*.json")}
    assert scores["ann/0-0.json"]["identity"] == pytest.approx(1.0, abs=1e-5)
    assert scores["ann/0-1.json"]["identity"] == 0.0 and scores["ann/0-1.json"]["face_missing"]

    rows = json.loads((out / "result.json").read_text())["rows"]
    assert (rows["prior"]["all"]["pictures"], rows["prior"]["all"]["face_missing"]) == (6, 6)
    result = rows["moa"]
    assert (result["all"]["pictures"], result["all"]["face_missing"]) == (6, 5)
    assert result["all"]["identity"]["mean"] == pytest.approx(1 / 6, abs=1e-5)
    beach, park = result["prompts"]
    assert beach["identity"] == pytest.approx({"mean": 0.25, "low": 0.0, "high": 0.5}, abs=1e-5)
    assert park["pictures"] == 2 and park["identity"]["high"] == 0.0
    consistency = [score["prompt_consistency"] for score in scores.values()]
    assert result["all"]["prompt_consistency"]["mean"] == pytest.approx(np.mean(consistency))
    assert -1 <= min(consistency) < max(consistency) <= 1
    printed, written = capsys.readouterr().out, (out / "result.md").read_text()
    assert written in printed and r"| moa | a \<subject> on a beach | 0.250 (0.000 to 0.500) |" in written
    assert "| prior | all | 0.000 (0.000 to 0.000) |" in written
    assert "2 subjects" in written


def test_processes_share_the_pictures_and_one_writes_the_figures(command):
    out = Path(command["--out"])
    assert run(command, images=1) == 0
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*/*/*")}
    printed, logged = finish(start("training.evaluate", "paper", *itertools.chain(*command.items()), processes=2))
    assert printed.count("2 subjects") == 1 and "6/6" in logged  # the main one's half
    assert kept.items() <= {path: path.stat().st_mtime_ns for path in out.glob("*/*/*")}.items()
    assert len(list(out.glob("*/*/*.png"))) == len(list(out.glob("*/*/*.json"))) == 12
    together = (out / "result.json").read_text()
    (out / "result.json").unlink()
    assert run(command) == 0 and (out / "result.json").read_text() == together
    assert not list(out.rglob("unfinished-*"))


def test_other_settings_do_not_mix_into_a_folder(command, capsys):
    assert run(command, images=1) == 0
    Path(command["--prompts"]).write_text("a <subject> in a park\n")
    assert run(command, images=1, steps=3) == 2
    assert f"{command['--out']} holds an evaluation with other settings (steps, prompts)" in capsys.readouterr().err


def test_what_cannot_be_used_is_named(command, judges, capsys):
    def refusal(**changed) -> str:
        assert run(command, **changed) == 2
        return capsys.readouterr().err

    assert "does not hold an InceptionResnetV1" in refusal(facenet=MODELS / "moa/moa-toy.safetensors")
    assert "found clip_vision_model at" in refusal(clip=judges / "half")
    assert f"found none at {judges / 'nowhere'}" in refusal(clip=judges / "nowhere")
    assert "needs <subject>" in refusal(prompts=write(command, "a person on a beach"))
    assert "as a word by itself" in refusal(prompts=write(command, "a <subject>like thing"))
    assert "for 3 people: --subjects holds only 2" in refusal(prompts=write(command, "<subject> <subject> <subject>"))
    assert "beyond CLIP's 77 tokens" in refusal(prompts=write(command, "a " * 76 + "<subject>"))
    folder = Path(command["--subjects"]) / "ann"
    portrait(FACELESS)[0].save(folder / "2.jpg")
    assert f"{folder / '2.jpg'} shows no face" in refusal(all_pictures=True)
    (folder / "2.jpg").write_bytes(b"no picture")
    assert f"{folder / '2.jpg'} cannot be read" in refusal(all_pictures=True)
    lists = folder / "data.py"
    lists.write_text("IMAGE_TO_GENDER_EVAL = dict(ann=1)")
    assert "expected FastComposer's evaluation/single_object/data.py" in refusal(prompts=lists)
    lists.write_text(PUBLISHED.replace("bob", "cid"))
    assert "lacks 1 of the 2 subjects that --prompts lists: cid" in refusal(prompts=lists)
    assert f"--run: {folder} holds no checkpoint" in refusal(moa=None, run=folder)
    assert not Path(command["--out"]).exists()


def write(command: dict[str, str], prompt: str) -> Path:
    path = Path(command["--prompts"]).with_name("other.txt")
    path.write_text(prompt)
    return path


PUBLISHED = """
IMAGE_TO_GENDER_EVAL = {"ann": "woman", "bob": "man"}
OTHERS = {"nobody": "man"}
raise SystemExit("read, never run")

def get_place_prompts(class_token, unique_token):
    prompts = [
        "a {0} {1} on a beach".format(unique_token, class_token),
        "a {0} {1} in a park".format(
            unique_token, class_token
        ),
    ]
    return prompts

def get_action_prompts(class_token, unique_token):
    return [f"a photo of a {unique_token} {class_token} waving"]
"""
"""Of the form of FastComposer's list."""


def test_fastcomposers_lists_are_read_as_published_and_its_settings_are_the_defaults(command, tmp_path, capsys):
    (tmp_path / "data.py").write_text(PUBLISHED)
    folder = Path(command["--subjects"])
    (folder / "zoe").mkdir()  # not in the list
    (folder / "bob/2.jpg").write_bytes(b"not looked at: the second picture")
    assert run(command, prompts=tmp_path / "data.py", images=None, steps=1) == 0
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert [len(row["prompts"]) for row in result["rows"].values()] == [3, 3]
    assert {row["all"]["pictures"] for row in result["rows"].values()} == {2 * 3 * 4}
    settings = result["settings"]
    assert settings["prompts"] == [f"a {PLACEHOLDER} on a beach", f"a {PLACEHOLDER} in a park",
                                   f"a photo of a {PLACEHOLDER} waving"]  # fmt: skip
    assert [words.split()[0] for words in settings["subjects"].values()] == ["woman", "man"] and settings["cfg"] == 5.0
    with pytest.raises(SystemExit):
        main(["paper", "--help"])
    assert "(default 50)" in capsys.readouterr().out


def test_prompts_of_two_are_drawn_with_every_pair():
    people = [ReferencePerson(str(n), "man", {}, []) for n in range(15)]
    names = [shot.name for shot in plan(people, ["a <subject>", "a <subject> and a <subject>"], images=1)]
    assert len(names) == len(set(names)) == 15 + 105


@pytest.mark.parametrize("method", ["moa", "ip_adapter"])
def test_a_run_of_any_method_can_be_evaluated(command, toy, tmp_path, method):
    settings = config(toy, tmp_path / "run", 1)
    train(dataclasses.replace(settings, model=dataclasses.replace(settings.model, method=method)))
    assert run(command, moa=None, run=tmp_path / "run", images=1, steps=5) == 0
    rows = json.loads((tmp_path / "out/result.json").read_text())["rows"]
    assert list(rows) == ["prior", method]
    prior, ours = (Path(command["--out"]) / row / "ann/0-0.png" for row in rows)
    assert prior.read_bytes() != ours.read_bytes()


def test_faces_come_the_largest_first_and_references_may_be_of_several_sizes(judges, command):
    judge = FaceJudge(judges / "facenet.safetensors", torch.device("cpu"))
    ann, bob = read_people(Path(command["--subjects"]))
    (small,), (large,) = ann.pictures.values(), bob.pictures.values()
    both = Image.new("RGB", (400, 256))
    both.paste(small, (0, 64))
    both.paste(large.resize((256, 256)), (136, 0))
    faces = judge.faces(both)
    assert faces.shape == (2, 512) and judge.faces(large.resize((16, 16))).shape == (0, 512)
    alone = [judge.reference(person.pictures) for person in (bob, ann)]
    assert faces[1] @ alone[1] > faces[0] @ alone[1]
    merged = judge.reference(ann.pictures | {Path("2"): small.resize((256, 256))})
    assert merged.norm() == pytest.approx(1.0) and merged @ alone[1] > 0.5
    assert (ann.word, bob.word) == ("woman", "person") and ann.masks[0].shape == (IMAGE_SIZE, IMAGE_SIZE)


def unit(*degrees: float) -> torch.Tensor:
    angle = torch.deg2rad(torch.tensor(degrees))
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def test_faces_go_to_the_surest_subject_and_the_worst_counts():
    ann, both = unit(0), unit(0, 90)
    assert identity_preservation(unit(60), ann) == pytest.approx(0.5)
    assert identity_preservation(unit(60, 0), ann) == pytest.approx(0.5)  # a smaller face is no subject's
    assert identity_preservation(unit(120), ann) == 0.0
    assert identity_preservation(unit(), ann) == identity_preservation(unit(0), both) == 0.0
    assert identity_preservation(unit(80, 30), both) == pytest.approx(np.cos(np.pi / 6))
    # Both faces are nearest to the second subject; the surer one keeps it, the first gets what is left.
    assert identity_preservation(unit(60, 85), both) == pytest.approx(0.5)


def test_subjects_bind_to_their_placeholders_whatever_else_the_prompt_says():
    people = tuple(ReferencePerson(name, "man", {}, []) for name in "ab")
    shot = Shot(people, 0, "a man paints a <subject> and a <subject>", 0)
    words = clip_tokenizer().convert_ids_to_tokens(tokenize(shot.prompt))
    positions = [binding.position for binding in shot.bindings(people)]
    assert [words[p] for p in positions] == ["man</w>"] * 2 and positions == [5, 8]
    assert shot.seed(0) != shot.seed(1) != Shot(people, 0, shot.template, 1).seed(1)


def test_intervals_are_those_of_the_groups():
    assert interval([0.25]) == (0.25, 0.25, 0.25)
    assert interval([0, 1]) == (0.5, 0.0, 1.0)  # a quarter of the draws is (0, 0), a quarter (1, 1)
    mean, low, high = interval(np.arange(100) % 2)
    assert mean == 0.5 and low == pytest.approx(0.402, abs=0.02) and high == pytest.approx(0.598, abs=0.02)
    assert ratio_interval([1, 2, 3], [2, 2, 4]) == (0.75, 0.5, 1.0)
    assert ratio_interval([0, 3], [0, 4]) == (0.75, 0.75, 0.75)
    values = np.random.default_rng(0).random((2, 9))
    assert ratio_interval(*values) == ratio_interval(*values) != ratio_interval(*values, seed=1)
    with pytest.raises(ValueError, match="something to average"):
        interval([])
