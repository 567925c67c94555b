"""The toy world: the same everywhere, rightly captioned, and its masks mean what they say."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from toy_world.draw import draw_person, draw_pose, draw_scene
from toy_world.shape import IMAGE_SIZE
from toy_world.world import (
    ACTIONS,
    PLACES,
    SKINS,
    STYLES,
    Clothes,
    Identity,
    Person,
    Scene,
    sample_identity,
    sample_scene,
)
from training.toy.__main__ import main
from training.toy.dataset import render_dataset

ROOT = Path(__file__).parents[1]


def scenes(count: int, seed: int = 7) -> list[Scene]:
    return [sample_scene(np.random.default_rng([seed, i])) for i in range(count)]


def changed(a: Image.Image, b: Image.Image) -> np.ndarray:
    return (np.asarray(a) != np.asarray(b)).any(axis=-1)


def grown(mask: np.ndarray) -> np.ndarray:
    """By the one pixel that smooth edges spread over."""
    return np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(3))) > 0


def files_digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_another_process_renders_the_same_files_and_goes_on_where_one_stopped(tmp_path):
    render_dataset(tmp_path / "a", count=12, seed=3, test_share=0.3)
    (tmp_path / "a" / "00000" / "00000005.json").unlink()  # as if stopped there
    render_dataset(tmp_path / "a", count=230, seed=3, workers=2, test_share=0.3)
    command = [sys.executable, "-m", "training.toy", "render", "--out", str(tmp_path / "b"), "--count", "230"]
    subprocess.run([*command, "--seed", "3", "--test-share", "0.3"], cwd=ROOT, check=True)
    assert files_digest(tmp_path / "a") == files_digest(tmp_path / "b")


def test_noun_phrases_end_on_the_word_and_captions_read_like_english():
    for scene in scenes(300):
        assert len(scene.spans) == len(scene.people)
        for person, (start, end) in zip(scene.people, scene.spans, strict=True):
            phrase = scene.caption[start:end]
            assert phrase.split()[-1] == person.word and phrase.split()[0] in ("a", "an")
            assert scene.caption[end:].startswith(f" {person.action}")
        assert scene.caption.endswith(PLACES[scene.place])
    plain = Person(Identity("tan", "blue", "afro", False, False, 0, 0), "woman", "adult", "holding flowers",
                   Clothes("red", "navy", "plain", True), age_said=False)  # fmt: skip
    old = replace(plain, word="man", age="old", action="waving", age_said=True)
    caption = "an old man waving and a woman holding flowers in a forest"
    assert Scene("forest", "full length", (old, plain)).caption == caption


def test_everything_the_captions_name_occurs_and_only_plausible_people():
    seen = scenes(600)
    people = [person for scene in seen for person in scene.people]
    assert {scene.place for scene in seen} == set(PLACES)
    assert {person.action for person in people} == set(ACTIONS)
    assert {person.identity.style for person in people} == set(STYLES)
    assert 0.4 < sum(len(scene.people) == 2 for scene in seen) / len(seen) < 0.6
    assert all(p.word == "man" and p.age != "kid" for p in people if p.identity.beard)


@pytest.mark.parametrize("attribute, values", [("skin", SKINS), ("hair", ("pink", "black"))])
def test_another_look_of_one_person_changes_pixels_of_that_person_only(attribute, values):
    for scene in scenes(40):
        image, ids = draw_scene(scene)
        first = scene.people[0]
        value = next(v for v in values if v != getattr(first.identity, attribute))
        other = replace(first, identity=replace(first.identity, **{attribute: value}))
        again, same_ids = draw_scene(replace(scene, people=(other, *scene.people[1:])))
        difference = changed(image, again)
        assert (ids == same_ids).all() and difference.any()
        # Where hair shows in a gap thinner than a pixel, no pixel's centre is the person's.
        assert (difference & ~grown(ids == 1)).mean() < 1e-4


@pytest.mark.parametrize("action", ["holding flowers", "holding a book", "riding a bike"])
def test_what_is_held_covers_the_person_and_is_not_part_of_the_mask(action):
    identity = sample_identity(np.random.default_rng(0), "man", "adult")
    _, mask = draw_person(identity, action=action, framing="full length")
    blue, _ = draw_person(identity, action=action, framing="full length", background=(0, 0, 255))
    red, _ = draw_person(identity, action=action, framing="full length", background=(255, 0, 0))
    drawn = ~changed(blue, red)
    held = drawn & ~grown(mask)
    assert held.sum() > 100, "the thing is there and nobody's"
    assert mask.sum() > 500 and (mask & ~grown(drawn)).sum() == 0, "the mask shows nothing but the person"


def test_a_pose_lies_on_its_people_and_tells_nothing_else():
    for scene in scenes(40):
        people = np.asarray(draw_scene(scene)[1])
        bones = np.asarray(draw_pose(scene)).any(axis=-1)
        assert bones.any() and bones[people > 0].mean() > 0.03
        held = any(person.action in ("riding a bike", "holding flowers", "holding a book") for person in scene.people)
        assert (people[bones] > 0).mean() > (0.6 if held else 0.9)  # what is held covers them
    scene = next(scene for scene in scenes(40) if len(scene.people) == 1)
    other = replace(scene.people[0], clothes=replace(scene.people[0].clothes, top="navy"))
    same = replace(scene, place="beach", people=(other,))
    assert np.array_equal(draw_pose(scene), draw_pose(same))


def test_two_people_are_both_well_visible_the_first_one_left():
    for scene in scenes(200):
        _, ids = draw_scene(scene)
        centres = [np.argwhere(ids == n)[:, 1].mean() for n in range(1, len(scene.people) + 1)]
        assert centres == sorted(centres)
        assert min((ids == n).sum() for n in range(1, len(scene.people) + 1)) > 400


def test_a_larger_picture_shows_the_same():
    for scene in scenes(5):
        small, ids = draw_scene(scene)
        large, large_ids = draw_scene(scene, 2 * IMAGE_SIZE)
        reduced = np.asarray(large.reduce(2), float)
        assert np.abs(reduced - np.asarray(small, float)).mean() < 4
        assert (large_ids[::2, ::2] != ids).mean() < 0.03


def test_people_of_the_test_split_never_occur_in_training(tmp_path):
    render_dataset(tmp_path, count=300, seed=1, test_share=0.2)

    def identities(split: str) -> set[tuple]:
        looks = set()
        for name in (tmp_path / f"image_ids_{split}.txt").read_text().split():
            for person in json.loads((tmp_path / name[:5] / f"{name}.json").read_text())["toy"]["people"]:
                looks.add(tuple(person["identity"][key] for key in ("skin", "hair", "style", "glasses", "beard")))
        return looks

    train, test = identities("train"), identities("test")
    assert len(test) > 20 and len(train) > 100 and not train & test


def test_a_foreign_folder_and_other_values_are_refused_with_a_sentence(tmp_path, capsys):
    (tmp_path / "holiday.jpg").touch()
    assert main(["render", "--out", str(tmp_path), "--count", "1", "--seed", "0"]) == 2
    assert "is not empty" in capsys.readouterr().err
    own = tmp_path / "own"
    render_dataset(own, count=1, seed=0)
    with pytest.raises(ValueError, match=r"'seed': 0.*'seed': 1"):
        render_dataset(own, count=1, seed=1)
