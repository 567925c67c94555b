"""From raw pictures to the FFHQ layout, with tiny models of the real classes whose decisions are planted."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from planted_models import CAPTION, make_captioner, make_matcher, make_segmenter
from toy_run import finish, preparation, start

from toy_world.shape import IMAGE_SIZE
from training.data.annotate import Annotator, Found, annotate_pictures, noun_phrases
from training.data.dataset import SubjectDataset
from training.data.pairing import pair_up
from training.prepare import main

PARTS = ("captioner", "segmenter", "matcher")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, make in zip(PARTS, (make_captioner, make_segmenter, make_matcher), strict=True):
        make(folder / name)
    return folder


@pytest.fixture(scope="module")
def annotator(models):
    return Annotator(*(models / name for name in PARTS), torch.device("cpu"))


def options(models: Path) -> list[str]:
    return [text for name in PARTS for text in (f"--{name}", str(models / name))]


RED, BLUE = (2, 5, 7, 11), (9, 4, 14, 10)
"""left, top, right, bottom of the two people, in sixteenths of a picture."""


def box(size: tuple[int, int], sixteenths: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(part * side // 16 for part, side in zip(sixteenths, size * 2, strict=True))


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for name, size in (("ann.png", (128, 96)), ("bob.jpg", (96, 128)), ("more/cid.webp", (64, 64))):
        picture = Image.new("RGB", size, (0, 120, 0))
        for colour, where in (((255, 0, 0), RED), ((0, 0, 255), BLUE)):
            picture.paste(colour, box(size, where))
        picture.save(folder / name)
    Image.new("RGB", (64, 64), (0, 120, 0)).save(folder / "empty.png")
    (folder / "broken.jpg").write_bytes(b"no picture")
    return folder


def test_every_picture_with_people_becomes_a_record_that_training_reads(annotator, pictures, tmp_path):
    out = tmp_path / "out"
    assert annotate_pictures(pictures, out, annotator, batch=2, workers=1) == 3
    assert not (out / "broke").exists() and (out / "empty/empty.json").exists()
    assert (out / "image_ids.txt").read_text().split() == ["ann", "bob", "more_cid"]
    info = json.loads((out / "ann/ann.json").read_text())
    assert info["caption"] == CAPTION and [s["word"] for s in info["segments"]] == ["man", "woman"]
    ids = np.load(out / "ann/ann.npy")
    for number, where in ((1, BLUE), (2, RED)):  # the first phrase is the man's
        left, top, right, bottom = box((128, 96), where)
        expected = np.zeros_like(ids, bool)
        expected[top:bottom, left:right] = True
        assert ((ids == number) & expected).sum() > 0.9 * ((ids == number) | expected).sum()
    data = SubjectDataset(out, preparation(size=32, augment=False), "all")
    items = [data[n] for n in range(len(data))]
    assert not data.broken and all(item["valid"].sum() == 2 for item in items)


def test_a_stopped_run_goes_on_and_keeps_what_is_there(annotator, pictures, tmp_path):
    out = tmp_path / "out"
    first = pictures.parent / "first"
    first.mkdir()
    (pictures / "ann.png").rename(first / "ann.png")
    annotate_pictures(first, out, annotator, batch=1, workers=0)
    record = out / "ann/ann.json"
    record.write_text(record.read_text().replace("man", "hat"))
    (first / "ann.png").rename(pictures / "ann.png")
    annotate_pictures(pictures, out, annotator, batch=4, workers=0)
    assert "hat" in record.read_text() and (out / "image_ids.txt").read_text().split() == ["ann", "bob", "more_cid"]


def test_processes_share_the_pictures_and_the_last_writes_the_lists(annotator, models, pictures, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    annotate_pictures(pictures, one, annotator, batch=2, workers=0)
    for name in ("caf.jpg", "dan.png"):
        (pictures / name).write_bytes(b"no picture")
    (two / "bob").mkdir(parents=True)
    for path in (one / "bob").iterdir():
        path.rename(two / "bob" / path.name)  # as if one process had stopped there
    kept = {path: path.stat().st_mtime_ns for path in two.rglob("bob.*")}
    arguments = ["--pictures", pictures, "--out", two, *options(models), "--batch", "1", "--workers", "0"]
    printed, logged = finish(start("training.prepare", *arguments, processes=2))
    assert printed.count("3 records with people") == 1
    assert [logged.count(f"skipping {pictures / name}") for name in ("broken.jpg", "caf.jpg", "dan.png")] == [1, 1, 1]
    assert kept == {path: path.stat().st_mtime_ns for path in two.rglob("bob.*")}
    for part in ("", "_train", "_test"):
        assert (two / f"image_ids{part}.txt").read_text() == (one / f"image_ids{part}.txt").read_text()
    for name in ("ann", "more_/more_cid", "empty"):
        name = name if "/" in name else f"{name}/{name}"
        assert (two / f"{name}.json").read_text() == (one / f"{name}.json").read_text()
    assert not list(two.rglob("unfinished-*"))


def test_noun_phrases_name_one_person_each():
    caption = "An old man in a red hat, two women and the smiling young girl beside a woman's dog near another snowman"
    assert [caption[a:b] for a, b in noun_phrases(caption)] == ["An old man", "the smiling young girl", "a woman"]
    assert noun_phrases("people on a beach") == []


def test_pairs_are_the_surest_first():
    scores = torch.tensor([[0.9, 0.8, 0.1], [1.0, 0.2, 0.3]])
    assert pair_up(scores) == [(1, 0), (0, 1)]


def test_segments_carry_boxes_and_the_word_that_ends_the_phrase():
    ids = np.zeros((10, 12), np.uint8)
    ids[2:8, 3:5] = 1
    info = Found("an old man on a beach", ids, [(0, 10)]).info
    segment = {"id": 1, "bbox": [3, 2, 5, 8], "coco_label": "person", "start": 0, "end": 10, "word": "man"}
    assert info == {"caption": "an old man on a beach", "segments": [segment]}


def test_missing_folders_are_named(models, pictures, tmp_path, capsys):
    given = ["--pictures", str(pictures), "--out", str(tmp_path / "out"), *options(models)]
    for key in ("--pictures", "--segmenter"):
        assert main([*given, key, str(tmp_path / "nowhere")]) == 2
        assert "nowhere" in capsys.readouterr().err
    (tmp_path / "cut").mkdir()
    for file in (models / "matcher").iterdir():
        content = file.read_bytes()
        (tmp_path / "cut" / file.name).write_bytes(content[:1000] if file.suffix == ".safetensors" else content)
    assert main([*given, "--matcher", str(tmp_path / "cut")]) == 2
    assert "cut cannot be read as a CLIPModel" in capsys.readouterr().err


def test_latents_follow_where_a_base_is_given(models, pictures, tmp_path):
    out, base = tmp_path / "out", Path(__file__).parent.parent / "models/checkpoints/moa-toy-base.safetensors"
    last = ["--base", str(base), "--workers", "0"]
    assert main(["--pictures", str(pictures), "--out", str(out), *options(models), *last]) == 0
    data = SubjectDataset(out, preparation(size=IMAGE_SIZE, cached_latents=True), "all")
    shape = (2, 4, IMAGE_SIZE // 8, IMAGE_SIZE // 8)
    assert all(data[n]["moments"].shape == shape for n in range(len(data))) and not data.broken
