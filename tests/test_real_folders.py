"""Folders as people have them: names of any kind, turned, odd and broken pictures, shards cut short."""

import logging
import os
import struct
import subprocess
import sys
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image
from toy_run import PACK, preparation

from training.data.annotate import Found, annotate_pictures
from training.data.dataset import SubjectDataset, TooManyBroken
from training.data.layout import read_names
from training.data.pictures import PictureFiles, find_pictures, read_picture
from training.data.shards import ShardDataset, write_shards

NAMES = (
    "WhatsApp Image 2023-05-01 at 10.22.33.jpg", " leading and trailing .jpg", "Jürgen & Zoë (1) [kopie].png",
    "写真😀.webp", "100%.png", "...png", "two\nlines.png", "tab\tand\u2028line.png", "a'b\"c;d.jpg", "__init__.png",
    "Foto 1.jpg", "Foto 1.png", "v1.0.2 .jpg",
)  # fmt: skip
if os.name == "nt":
    NAMES = tuple(name for name in NAMES if not set(name) & set('\n\t"\u2028'))
SIZE = (48, 64)


ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
"""A locale that knows no umlauts, and a Python that takes it as it is."""


class OnePerson:
    """In the place of the three models: everybody is a man on the left."""

    def annotate(self, pictures):
        found = []
        for picture in pictures:
            ids = np.zeros(picture.size[::-1], np.uint8)
            ids[:, : picture.width // 2] = 1
            found.append(Found("a man", ids, [(0, 5)]))
        return found


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "pictures"
    made.mkdir()
    for number, name in enumerate(NAMES):
        kind = {"jpg": "JPEG", "ebp": "WEBP", "png": "PNG"}[name[-3:]]
        Image.new("RGB", SIZE, (10 * number, 100, 0)).save(made / name, kind, quality=100)
    return made


def test_pictures_of_any_name_come_back_from_the_data_set_and_from_its_shards(folder, tmp_path):
    data = tmp_path / "data"
    assert annotate_pictures(folder, data, OnePerson(), batch=4, workers=0) == len(NAMES)
    names = read_names(data, "all")
    assert len(names) == len(NAMES) == len(set(names))
    assert all(path.resolve().is_relative_to(data) for path in data.rglob("*"))
    folders = [path.name for path in data.iterdir() if path.is_dir()]
    assert not any(name.endswith((" ", ".")) for name in folders), "Windows drops such an end"
    for split in ("train", "test"):
        (data / f"image_ids_{split}.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    records = SubjectDataset(data, preparation(augment=False), "train")
    reds = sorted(round((float(item["picture"][0].mean()) + 1) * 127.5) for item in records)
    assert not records.broken and np.abs(np.array(reds) - 10 * np.arange(len(NAMES))).max() <= 1

    write_shards(data, tmp_path / "shards", records=3)
    stream = iter(ShardDataset(tmp_path / "shards", preparation(augment=False), "train"))
    streamed = [next(stream) for _ in NAMES]
    assert sorted(round((float(item["picture"][0].mean()) + 1) * 127.5) for item in streamed) == reds


def test_lists_are_read_alike_in_every_locale(tmp_path):
    (tmp_path / "image_ids.txt").write_bytes("Jürgen 1\r\n写真 😀\n\n".encode())
    code = "from training.data.layout import read_names; from pathlib import Path; import sys; "
    code += "sys.stdout.buffer.write('|'.join(read_names(Path(sys.argv[1]), 'all')).encode())"
    done = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", code, str(tmp_path)], cwd=PACK, env=os.environ | ASCII,
        capture_output=True, check=True,
    )  # fmt: skip
    assert done.stdout.decode() == "Jürgen 1|写真 😀"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photo_stands_upright_everywhere(tmp_path, orientation):
    upright = Image.new("RGB", (40, 60), (0, 0, 255))
    upright.paste((255, 0, 0), (0, 0, 40, 20))  # the sky is red
    turned = {
        1: lambda p: p, 2: lambda p: p.transpose(0), 3: lambda p: p.rotate(180), 4: lambda p: p.transpose(1),
        5: lambda p: p.transpose(5), 6: lambda p: p.rotate(90, expand=True), 7: lambda p: p.transpose(6),
        8: lambda p: p.rotate(-90, expand=True),
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = turned[orientation](upright)
    stored.save(tmp_path / "photo.jpg", quality=100, subsampling=0, exif=exif)
    assert annotate_pictures(tmp_path, tmp_path / "data", OnePerson(), 1, 0) == 1
    for picture in (read_picture(tmp_path / "photo.jpg"), read_picture(tmp_path / "data/photo/photo.jpg")):
        assert picture.size == (40, 60)
        assert picture.getpixel((20, 5))[0] > 200 and picture.getpixel((20, 40))[2] > 200


def odd_pictures(folder) -> dict[str, tuple[int, int, int]]:
    """Files whose middle looks like this."""

    def made(name, picture, colour, **options):
        picture.save(folder / name, **options)
        return {name: colour}

    sixteen = Image.fromarray(np.full((64, 64), 32896, np.uint16))
    clear = Image.new("P", (64, 64), 1)
    clear.putpalette([0, 0, 0, 9, 9, 9])
    frames = [Image.new("RGB", (64, 64), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    return {
        **made("cmyk.jpg", Image.new("CMYK", (64, 64), (255, 0, 0, 0)), (0, 255, 255), quality=100),
        **made("grey16.png", sixteen, (128, 128, 128)),
        **made("grey.png", Image.new("L", (64, 64), 77), (77, 77, 77)),
        **made("palette.png", clear, (255, 255, 255), transparency=1),
        **made("through.png", Image.new("RGBA", (64, 64), (0, 0, 0, 0)), (255, 255, 255)),
        **made("half.webp", Image.new("RGBA", (64, 64), (0, 0, 0, 128)), (127, 127, 127), lossless=True),
        **made("moving.webp", frames[0], (200, 0, 0), save_all=True, append_images=frames[1:], lossless=True),
        **made("moving.png", frames[0], (200, 0, 0), save_all=True, append_images=frames[1:]),
        **made("moving.gif", frames[0], (200, 0, 0), save_all=True, append_images=frames[1:]),
        **made("cmyk.tif", Image.new("CMYK", (64, 64), (255, 0, 0, 0)), (0, 255, 255), compression="tiff_lzw"),
        **made("grey16.tiff", sixteen, (128, 128, 128)),
        **made("grey and clear.png", Image.new("LA", (64, 64), (0, 0)), (255, 255, 255)),
    }  # fmt: skip


def test_what_is_left_out_of_a_folder_is_said(folder, tmp_path, caplog):
    for name in ("IMG_1.HEIC", "IMG_2.heic", "notes"):
        (folder / name).write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert len(find_pictures(folder)) == len(NAMES)
    assert "3 files that are left out: 2 .heic, 1 notes" in caplog.text


def huge_png(side: int) -> bytes:
    """The header of a picture too large to be meant well."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)) + chunk(b"IEND", b"")
    )


def test_odd_pictures_are_read_right_and_broken_ones_skipped_and_named(tmp_path, caplog):
    expected = odd_pictures(tmp_path)
    whole = Image.effect_noise((64, 64), 80)
    whole.save(tmp_path / "whole.jpg")
    broken = {
        "huge.png": huge_png(60_000), "cut.jpg": (tmp_path / "whole.jpg").read_bytes()[:700], "empty.jpg": b"",
        "text.png": b"no picture at all", "cut.webp": (tmp_path / "half.webp").read_bytes()[:20],
        "no.avif": b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf", "avif.jpg": b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf",
    }  # fmt: skip
    for name, picture in (("dot.png", Image.new("RGB", (1, 1))), ("measured.tif", Image.new("F", (64, 64)))):
        picture.save(tmp_path / name)
        broken[name] = (tmp_path / name).read_bytes()
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
    with caplog.at_level(logging.WARNING):
        read = dict(PictureFiles({name: tmp_path / name for name in (*expected, *broken)}))
    for name, colour in expected.items():
        assert np.abs(np.array(read[name].getpixel((32, 32))) - colour).max() <= 3, name
    for name in broken:
        assert read[name] is None and name in caplog.text


@pytest.mark.parametrize("where", ["within a file", "within a header", "between two records", "at its end"])
def test_a_shard_that_is_cut_short_is_named_and_left(folder, tmp_path, caplog, where):
    data, shards = tmp_path / "data", tmp_path / "shards"
    annotate_pictures(folder, data, OnePerson(), 4, 0)
    (data / "image_ids_train.txt").write_text("".join(f"{n}\n" for n in read_names(data, "all")), encoding="utf-8")
    (data / "image_ids_test.txt").write_text(f"{read_names(data, 'all')[0]}\n", encoding="utf-8")
    write_shards(data, shards, records=7)
    first, second = sorted(shards.glob("train-*.tar"))
    with tarfile.open(first) as tar:
        third, last = tar.getmembers()[6], tar.getmembers()[-1]
    cut = {
        "within a file": third.offset_data + 100, "within a header": third.offset + 100,
        "between two records": third.offset, "at its end": last.offset_data + -(-last.size // 512) * 512,
    }  # fmt: skip
    first.write_bytes(first.read_bytes()[: cut[where]])
    records = ShardDataset(shards, preparation(augment=False), "train")
    with caplog.at_level(logging.WARNING):
        stream = iter(records)
        seen = {next(stream)["id"] for _ in range(20)}
    assert len(seen) == (len(NAMES) if where == "at its end" else len(NAMES) - 5)
    assert caplog.text.count(first.name) == 1 and first.name in records.broken, "told once, however often it is read"
    for shard in (first, second):
        shard.write_bytes(b"no shard")
    with pytest.raises(TooManyBroken, match="damaged, pack them again"):
        list(ShardDataset(shards, preparation(augment=False), "train"))


def test_a_path_that_looks_like_a_url_is_a_path(folder, tmp_path, monkeypatch):
    """As every path on Windows does, by its drive's letter."""
    monkeypatch.chdir(tmp_path)
    data, shards = tmp_path / "data", type(tmp_path)("c:shards")
    annotate_pictures(folder, data, OnePerson(), 4, 0)
    for split in ("train", "test"):
        (data / f"image_ids_{split}.txt").write_text(f"{read_names(data, 'all')[0]}\n", encoding="utf-8")
    assert write_shards(data, shards) == 2
    assert next(iter(ShardDataset(shards, preparation(augment=False), "train")))["caption"] == "a man"
