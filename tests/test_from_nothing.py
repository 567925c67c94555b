"""From a folder of pictures to a MoA file with its card and figures, by the commands that training/README.md names."""

import json

import torch
from from_nothing import ANN, configuration

from moa_core.learned.moa_file import load_moa
from training.config import config_of
from training.data.dataset import SubjectDataset
from training.data.preparation import Preparation
from training.host.pipeline import MoAPipeline
from training.host.pretrained import fresh_moa, load_base


def test_the_pages_configuration_is_the_papers(from_nothing):
    config = config_of(from_nothing / "mine.yaml", configuration())
    assert config.optimizer.batch * config.optimizer.accumulate == 128 and config.optimizer.steps == 40_000
    assert config.loss == type(config.loss)() and config.run.precision == "bf16"


def test_pictures_became_records_with_latents(from_nothing):
    data = SubjectDataset(from_nothing / "data/mine", Preparation(192, 32, cached_latents=True), "all")
    items = [data[n] for n in range(len(data))]
    assert len(items) == 4 and not data.broken
    assert all(item["valid"].sum() == 2 and "moments" in item for item in items)


def test_the_moa_was_judged_and_has_its_card(from_nothing):
    rows = json.loads((from_nothing / "runs/mine/evaluation/result.json").read_text())["rows"]
    assert {name: row["all"]["pictures"] for name, row in rows.items()} == {"prior": 1, "moa": 1}
    drawn = [(from_nothing / f"runs/mine/evaluation/{row}/ann/0-0.png").read_bytes() for row in rows]
    assert drawn[0] != drawn[1]
    card = (from_nothing / "runs/mine/moa-mine.md").read_text(encoding="utf-8")
    assert "3 steps, 6 records in all" in card and "`mine`" in card


def test_it_draws_in_diffusers_and_has_learnt(from_nothing):
    base, moa = (
        load_base(from_nothing / "models/stable-diffusion-v1-5"),
        load_moa(from_nothing / "runs/mine/moa-mine.safetensors"),
    )
    fresh = fresh_moa(base, from_nothing / "models/clip-vit-large-patch14").state_dict()
    moved = [name for name, weight in moa.state_dict().items() if not torch.equal(weight.half(), fresh[name].half())]
    assert any("expert" in name for name in moved) and any("subject_prompt" in name for name in moved)
    assert any("image_encoder" in name for name in moved)
    pipeline = MoAPipeline(base, moa.eval())
    subject = pipeline.encode_subject([torch.rand(64, 64, 3)], "woman")
    options = {"steps": 2, "cfg": 2.0, "seed": ANN}
    drawn, _ = pipeline("a woman on a beach", [subject], **options)
    prior, _ = pipeline("a woman on a beach", [subject], strength=0.0, **options)
    assert drawn.isfinite().all() and not torch.equal(drawn, prior)
