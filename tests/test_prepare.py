"""From raw pictures to the FFHQ layout, with tiny random models of the real classes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    SwinConfig,
)

from training.data.annotate import Annotator, Found, annotate_pictures, noun_phrases
from training.data.dataset import SubjectDataset
from training.data.pairing import pair_up
from training.data.preparation import Preparation
from training.host.tokenizer import clip_tokenizer
from training.prepare import main

TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def make_captioner(folder) -> None:
    """Always says `a man a man a man ...`."""
    tokenizer = clip_tokenizer()
    a, man = tokenizer("a man")["input_ids"][1:3]
    config = Blip2Config(
        vision_config=TINY | {"image_size": 16, "patch_size": 8},
        qformer_config=TINY | {"encoder_hidden_size": 16, "vocab_size": 40},
        text_config={
            "model_type": "opt", "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "vocab_size": len(tokenizer) + 8, "word_embed_proj_dim": 16, "max_position_embeddings": 128,
            "pad_token_id": 1, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id,
        },
        num_query_tokens=2,
    )  # fmt: skip
    model = Blip2ForConditionalGeneration(config)
    decoder = model.language_model.model.decoder
    # What it says next follows from the last token alone: `man` after all but `man`, then `a`.
    torch.nn.init.zeros_(model.language_model.lm_head.weight)
    model.language_model.lm_head.weight.data[man, 0] = 1.0
    model.language_model.lm_head.weight.data[a, 0] = -1.0
    decoder.final_layer_norm.weight.data.zero_()
    decoder.final_layer_norm.bias.data.zero_()
    decoder.final_layer_norm.bias.data[0] = 1.0
    processor = Blip2Processor(BlipImageProcessor(size={"height": 16, "width": 16}), tokenizer, num_query_tokens=2)
    processor.tokenizer.add_tokens(["<image>"], special_tokens=True)
    model.config.image_token_index = processor.tokenizer.convert_tokens_to_ids("<image>")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def make_segmenter(folder) -> None:
    """Calls everything it finds a person."""
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(
            embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4, image_size=64,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        hidden_dim=32, feature_size=32, mask_feature_size=32, num_queries=4, num_attention_heads=2,
        encoder_layers=1, decoder_layers=2, encoder_feedforward_dim=16, dim_feedforward=16,
        id2label={0: "person", 1: "dog"}, label2id={"person": 0, "dog": 1},
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config)
    model.class_predictor.weight.data.zero_()
    model.class_predictor.bias.data = torch.tensor([9.0, 0.0, 0.0])
    model.save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)


def make_matcher(folder) -> None:
    text = TINY | {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407}
    vision = TINY | {"image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    CLIPProcessor(CLIPImageProcessor(size=size, crop_size=size), clip_tokenizer()).save_pretrained(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, make in (("captioner", make_captioner), ("segmenter", make_segmenter), ("matcher", make_matcher)):
        make(folder / name)
    return folder


@pytest.fixture(scope="module")
def annotator(models):
    return Annotator(*(models / name for name in ("captioner", "segmenter", "matcher")), torch.device("cpu"))


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in (("ann.png", (60, 48)), ("bob.jpg", (48, 60)), ("more/cid.webp", (64, 64))):
        coarse = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"no picture")
    return folder


def test_every_readable_picture_becomes_a_record_that_training_reads(annotator, pictures, tmp_path):
    out = tmp_path / "out"
    useful = annotate_pictures(pictures, out, annotator, batch=2, workers=1)
    assert useful >= 1
    assert not (out / "broke").exists()
    names = (out / "image_ids.txt").read_text().split()
    assert len(names) == useful and set(names) <= {"ann", "bob", "more_cid"}
    info = json.loads((out / names[0][:5] / f"{names[0]}.json").read_text())
    assert info["caption"].startswith("man") and info["segments"][0]["word"] == "man"
    data = SubjectDataset(out, Preparation(size=32, augment=False), "all")
    items = [data[n] for n in range(len(data))]
    assert not data.broken and any(item["valid"].any() for item in items)


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
    assert "hat" in record.read_text() and (out / "bob/bob.json").exists()


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
    options = ["--pictures", str(pictures), "--out", str(tmp_path / "out")]
    parts = {f"--{name}": str(models / name) for name in ("captioner", "segmenter", "matcher")}
    for key in ("--pictures", "--segmenter"):
        changed = dict(zip(options[::2], options[1::2], strict=True)) | parts | {key: str(tmp_path / "nowhere")}
        assert main([text for pair in changed.items() for text in pair]) == 2
        assert "nowhere" in capsys.readouterr().err


def test_latents_follow_where_a_base_is_given(models, pictures, tmp_path):
    out, base = tmp_path / "out", Path(__file__).parent.parent / "models/checkpoints/moa-toy-base.safetensors"
    parts = [text for name in ("captioner", "segmenter", "matcher") for text in (f"--{name}", str(models / name))]
    last = ["--base", str(base), "--size", "32", "--workers", "0"]
    assert main(["--pictures", str(pictures), "--out", str(out), *parts, *last]) == 0
    data = SubjectDataset(out, Preparation(size=32, cached_latents=True), "all")
    assert all(data[n]["moments"].shape == (2, 4, 4, 4) for n in range(len(data))) and not data.broken
