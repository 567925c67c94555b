"""The reader of the FFHQ layout: aligned, repeatable, and clear about broken records."""

from __future__ import annotations

import itertools
import json
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from toy_run import preparation

from moa_core.subjects.reference import MEAN, STD
from toy_world.shape import IMAGE_SIZE as SIDE
from training.config import Augmentation
from training.data.dataset import SubjectDataset, TooManyBroken
from training.data.layout import folder_of
from training.data.records import BrokenRecord, read_record
from training.data.shards import ShardDataset, write_shards
from training.toy.dataset import render_dataset

MIDDLE = preparation(augment=False)
"""The square in the picture's middle."""
SUBJECTS = ((200, 30, 40), (30, 60, 220))


@pytest.fixture
def toy(tmp_path):
    render_dataset(tmp_path, count=24, seed=5, test_share=0.25)
    return tmp_path


def write_record(root, name: str, width: int, height: int, boxes: list[tuple[int, int, int, int]]) -> None:
    """A green picture with a box (left, top, right, bottom) of pure colour per subject."""
    pixels = np.full((height, width, 3), (0, 160, 0), np.uint8)
    ids, segments, caption = np.zeros((height, width), np.int64), [], ""
    for n, (left, top, right, bottom) in enumerate(boxes, start=1):
        pixels[top:bottom, left:right], ids[top:bottom, left:right] = SUBJECTS[n - 1], n
        start, caption = len(caption), f"{caption}a man "
        box = [left, top, right, bottom]
        segments.append(dict(id=n, bbox=box, coco_label="person", word="man", start=start, end=start + 5))
    folder = root / name[:5]
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / f"{name}.jpg", quality=100, subsampling=0)
    np.save(folder / f"{name}.npy", ids)
    (folder / f"{name}.json").write_text(json.dumps({"caption": caption, "segments": segments}))
    for split in ("", "_train", "_test"):
        with open(root / f"image_ids{split}.txt", "a") as file:
            file.write(f"{name}\n")


def as_picture(reference: torch.Tensor) -> torch.Tensor:
    """Back to colours in 0..255, [3, R, R]."""
    return (reference * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]) * 255


def test_a_rendered_data_set_comes_back_as_it_was_written(toy):
    data = SubjectDataset(toy, MIDDLE, "all")
    assert len(data) == 24 == len(SubjectDataset(toy, MIDDLE, "train")) + len(SubjectDataset(toy, MIDDLE, "test"))
    for item in data:
        folder = toy / item["id"][:5]
        info = json.loads((folder / f"{item['id']}.json").read_text())
        ids = torch.from_numpy(np.load(folder / f"{item['id']}.npy"))
        pixels = np.asarray(Image.open(folder / f"{item['id']}.jpg"), np.float32)
        assert np.abs((item["picture"].movedim(0, -1).numpy() + 1) * 127.5 - pixels).max() < 1e-3
        count = len(info["segments"])
        assert item["valid"].tolist() == [True] * count + [False] * (4 - count)
        for n, segment in enumerate(info["segments"]):
            assert (item["masks"][n] == (ids == segment["id"])).all()
            assert item["caption"][: item["positions"][n]].endswith(segment["word"])
    batch = next(iter(DataLoader(data, batch_size=4)))
    assert batch["references"].shape == (4, 4, 3, 64, 64) and len(batch["caption"]) == 4


def test_a_reference_shows_its_subject_on_the_neutral_colour_and_nobody_else(tmp_path):
    write_record(tmp_path, "00000000", 96, 96, [(4, 20, 34, 90), (50, 20, 90, 60)])
    first, second = (as_picture(r) for r in SubjectDataset(tmp_path, MIDDLE)[0]["references"][:2])
    for picture, colour in ((first, SUBJECTS[0]), (second, SUBJECTS[1])):
        assert (picture[:, 32, 32] - torch.tensor(colour)).abs().max() < 6
    assert (first[:, 32, 2] - torch.tensor(MEAN) * 255).abs().max() < 6  # a tall subject is padded at its sides
    assert (first[2] < 130).all() and (second[0] < 140).all()  # no blue of the second, no red of the first


def test_a_random_background_is_one_colour_around_the_whole_subject(tmp_path):
    write_record(tmp_path, "00000000", 96, 96, [(4, 20, 34, 90)])
    data = SubjectDataset(tmp_path, preparation(reference_background="random"))
    corners = []
    for epoch in range(2):
        picture = as_picture(data[epoch, 0]["references"][0])
        assert (picture[:, 32, 32] - torch.tensor(SUBJECTS[0])).abs().max() < 6
        assert (picture[:, 0, 0] - picture[:, 63, 63]).abs().max() < 3
        corners.append(picture[:, 0, 0])
    assert (corners[0] - corners[1]).abs().max() > 10


def test_augmentations_do_to_references_what_their_names_say(tmp_path):
    write_record(tmp_path, "00000000", 96, 96, [(10, 10, 40, 90), (60, 20, 84, 44)])
    path = tmp_path / "00000/00000000.jpg"
    pixels = np.asarray(Image.open(path)).copy()
    pixels[10:40, 10:25] = (250, 240, 30)  # a head in two colours
    Image.fromarray(pixels).save(path, quality=100, subsampling=0)

    def references(epoch: int = 0, augment: bool = True, background: str = "neutral", **chances) -> torch.Tensor:
        options = {"reference_background": background, "augmentation": Augmentation(**chances), "augment": augment}
        return as_picture(SubjectDataset(tmp_path, preparation(**options))[epoch, 0]["references"][:2])

    plain, all_ways = references(), dict.fromkeys(vars(Augmentation()), 1.0)
    flipped, grey, zoomed = references(flip=1.0), references(grey=1.0), references(zoom=1.0)
    assert (flipped - plain.flip(-1)).abs().mean() < 4 < (flipped - plain).abs().mean()
    assert (grey - grey.mean(dim=1, keepdim=True)).abs().max() < 1
    # Of the tall one the head alone, which then fills the picture; the square one stays.
    assert (plain[0, :, 56, 25] - torch.tensor(SUBJECTS[0])).abs().max() < 25
    assert (zoomed[0, :, 56, 12] - torch.tensor([250, 240, 30])).abs().max() < 25
    assert (zoomed[1] - plain[1]).abs().mean() < 4
    for way in ("rotation", "jitter", "blur", "elastic"):
        one, again, other = (references(epoch, **{way: 1.0}) for epoch in (0, 0, 1))
        assert torch.equal(one, again) and (one - other).abs().mean() > 0.1 < (one - plain).abs().mean(), way
    assert torch.equal(references(augment=False, **all_ways), plain)  # what is shown and judged stays as it is
    noise = references(background="noise")
    assert noise[0, :, :, :8].std(dim=(1, 2)).min() > 20 and plain[0, :, :, :8].std(dim=(1, 2)).max() < 2


def test_a_subject_that_does_not_appear_stays_a_word(tmp_path):
    write_record(tmp_path, "00000000", 96, 96, [(4, 20, 34, 90), (50, 20, 90, 60)])
    often = SubjectDataset(tmp_path, preparation(appear=0.8))
    items = [often[epoch, 0] for epoch in range(100)]
    shown = torch.stack([item["valid"][:2].sum() for item in items])
    assert set(shown.tolist()) == {0, 1, 2} and 130 < shown.sum() < 185
    alone = next(item for item in items if item["valid"].sum() == 1)
    assert alone["caption"].count("man") == 2 and alone["masks"][1:].sum() == 0
    judged = SubjectDataset(tmp_path, preparation(appear=0.8, augment=False))
    assert all(judged[epoch, 0]["valid"][:2].all() for epoch in range(20))


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(40, 120),
    height=st.integers(40, 120),
    epoch=st.integers(0, 1000),
    crop=st.floats(0.4, 1),
)
def test_masks_follow_the_picture_through_every_crop(tmp_path_factory, width, height, epoch, crop):
    root = tmp_path_factory.mktemp("crop")
    middle = width // 2
    write_record(root, "00000000", width, height, [(3, 8, middle - 3, 36), (middle + 3, 5, width - 3, 30)])
    data = SubjectDataset(root, preparation(size=48, smallest_crop=crop))
    item = data[epoch, 0]
    colours = (item["picture"] + 1) * 127.5
    for n in item["valid"].nonzero().flatten():
        number = int(item["positions"][n]) // 6  # 5 or 11 characters into the caption
        near = (colours - torch.tensor(SUBJECTS[number])[:, None, None]).abs().amax(dim=0) < 60
        # Both are sharp boxes; only the pixels across an edge may disagree.
        wrong = (near != item["masks"][n].bool()).float()
        inside = -torch.nn.functional.max_pool2d(-wrong[None], 4, 1)
        assert inside.max() == 0
        assert item["masks"][n].mean() >= 0.01


def test_subjects_cropped_away_or_too_small_are_dropped(tmp_path):
    write_record(tmp_path, "00000000", 300, 100, [(2, 20, 40, 80), (130, 20, 170, 80)])
    item = SubjectDataset(tmp_path, MIDDLE)[0]  # the square in the middle shows columns 100 to 200
    assert item["valid"].tolist() == [True, False, False, False]
    assert item["positions"][0] == 11 and item["masks"][1:].sum() == 0
    assert not SubjectDataset(tmp_path, preparation(augment=False, min_area=0.5))[0]["valid"].any()


def test_the_same_seed_epoch_and_index_give_the_same_item_in_any_worker(toy):
    def items(epoch: int, workers: int) -> list[torch.Tensor]:
        data = SubjectDataset(toy, preparation(smallest_crop=0.6), seed=9)
        keys = [(epoch, index) for index in range(len(data))]
        return [batch["picture"] for batch in DataLoader(data, 6, sampler=keys, num_workers=workers)]

    assert all(torch.equal(a, b) for a, b in zip(items(1, 0), items(1, 2), strict=True))
    assert not torch.equal(items(1, 0)[0], items(2, 0)[0])


def edit(path, change) -> None:
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


BREAKS = {
    "no picture": (".jpg", lambda path: path.unlink(), "no such file"),
    "half a picture": (".jpg", lambda path: path.write_bytes(path.read_bytes()[:900]), "a picture"),
    "no JSON": (".json", lambda path: path.write_text('{"caption": '), "JSON"),
    "no caption": (".json", lambda path: edit(path, lambda i: i.pop("caption")), "caption"),
    "no end": (".json", lambda path: edit(path, lambda i: i["segments"][0].pop("end")), "whole numbers"),
    "far end": (".json", lambda path: edit(path, lambda i: i["segments"][0].update(end=999)), "999"),
    "other id": (".json", lambda path: edit(path, lambda i: i["segments"][0].update(id=7)), "segment 7"),
    "other shape": (
        ".npy",
        lambda path: np.save(path, np.zeros((9, 8), int)),
        rf"\[{SIDE}, {SIDE}\].*\[9, 8\]",
    ),
    "empty map": (".npy", lambda path: path.write_bytes(b""), "map of segment ids"),
    "pickled map": (
        ".npy",
        lambda path: np.save(path, np.array([{}]), allow_pickle=True),
        "map of segment ids",
    ),
}


@pytest.mark.parametrize("kind", BREAKS)
def test_a_broken_record_says_which_file_and_what_and_is_skipped(toy, kind, caplog):
    ending, damage, words = BREAKS[kind]
    data = SubjectDataset(toy, preparation())
    name = data.names[2]
    path = toy / name[:5] / f"{name}{ending}"
    damage(path)
    with pytest.raises(BrokenRecord, match=words) as raised:
        read_record(folder_of(toy, name), name)
    # A segment without pixels shows in the map, whichever of the two files is wrong.
    assert raised.value.file == (path.with_suffix(".npy") if kind == "other id" else path)
    assert str(raised.value.file) in str(raised.value) and "expected" in str(raised.value)
    with caplog.at_level(logging.WARNING):
        assert data[2]["id"] == data.names[3]
        assert data[2]["id"] == data.names[3]
    assert list(data.broken) == [name] and caplog.text.count(name) == 1


def test_a_damaged_data_set_stops_with_a_sentence(toy):
    data = SubjectDataset(toy, preparation())
    for name in data.names[:6]:
        (toy / name[:5] / f"{name}.jpg").unlink()
    with pytest.raises(TooManyBroken, match=r"6 of the \d+ records .* more than 1%"):
        [data[i] for i in range(len(data))]


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"image_ids_train.txt is missing"):
        SubjectDataset(tmp_path, preparation())


# Shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("folder")
    render_dataset(out, 24, seed=1, test_share=0.2)
    return out


@pytest.fixture(scope="module")
def shards(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("shards")
    assert write_shards(folder, out, records=3) >= 8
    return out


def test_a_shard_gives_what_the_folder_gives(folder, shards):
    data = SubjectDataset(folder, MIDDLE)
    items = {item["id"]: item for item in (data[n] for n in range(len(data)))}
    stream = ShardDataset(shards, MIDDLE, "train")
    for item in itertools.islice(stream, len(data)):
        same = items.pop(item["id"])
        assert item["caption"] == same["caption"]
        assert all(torch.equal(item[key], same[key]) for key in ("picture", "references", "masks", "positions"))
    assert not items


@pytest.mark.parametrize("processes, workers", [(1, 0), (2, 0), (2, 2)])
def test_readers_share_an_epoch_and_each_epoch_has_its_own_order(folder, shards, processes, workers):
    count = len(SubjectDataset(folder, MIDDLE, "train"))

    def ids(process: int) -> list[str]:
        stream = ShardDataset(shards, preparation(), "train", 3, process, processes)
        loader = DataLoader(stream, 1, num_workers=workers, collate_fn=lambda items: items[0]["id"])
        return list(itertools.islice(loader, 2 * count))

    seen = [ids(process) for process in range(processes)]
    assert seen == [ids(process) for process in range(processes)]
    if processes == 1:
        first, second = seen[0][:count], seen[0][count:]
        assert sorted(first) == sorted(second) == sorted(set(first)) and first != second
    else:  # readers have shards of different lengths, so that an epoch ends for one before the other
        assert set(seen[0][: count // 4]).isdisjoint(seen[1][: count // 4])
        assert len(set(seen[0]) | set(seen[1])) == count


def test_a_broken_record_in_a_shard_is_named_and_left_out(toy, tmp_path, caplog):
    names = SubjectDataset(toy, preparation()).names
    name = names[3]
    (toy / name[:5] / f"{name}.npy").write_bytes(b"")
    write_shards(toy, tmp_path / "out", records=40)
    stream = ShardDataset(tmp_path / "out", preparation(), "train")
    seen = [item["id"] for item in itertools.islice(stream, 2 * len(names) - 2)]
    assert name not in seen and list(stream.broken) == [name]
    assert f"train-000000.tar/{name}.npy" in caplog.text


def test_too_few_shards_for_the_readers_is_said(shards):
    with pytest.raises(ValueError, match="holds .* shards for 99 readers.*fewer records per shard"):
        next(iter(ShardDataset(shards, preparation(), "train", processes=99)))
