"""Trainings on machines as they are: numbers that run away, full disks, two at once, files that must not stay open."""

import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from toy_run import ENVIRONMENT, PACK, config, curve, preparation
from transformers import CLIPTextConfig, CLIPTextModel

from moa_core.learned.moa_file import MoAFileError, load_moa, save_moa
from training.config import ConfigError, config_of, read_config
from training.data.batch import collate
from training.data.dataset import SubjectDataset
from training.finetune import loop, losses
from training.finetune.checkpoint import CheckpointError, checkpoints, find_checkpoint, load_checkpoint
from training.finetune.loop import TrainingFailed, train
from training.finetune.model import build, trained
from training.finetune.sole_run import sole_run
from training.host.base import BaseError
from training.host.pretrained import load_base
from training.train import main


def failing_at(monkeypatch, *steps: int) -> None:
    """The loss of these passes, counted from 0, is no number."""
    passes = iter(range(1000))
    real = losses.router_loss

    def fails(*args):
        return real(*args) * (math.nan if next(passes) in steps else 1.0)

    monkeypatch.setattr("training.finetune.model.router_loss", fails)


def test_a_step_without_a_number_is_skipped_and_counted(toy, tmp_path, monkeypatch):
    failing_at(monkeypatch, 1)
    train(config(toy, tmp_path, 3))
    assert curve(tmp_path, "skipped") == [(1, 0), (2, 1), (3, 1)]
    weights = load_file(checkpoints(tmp_path / "checkpoints")[-1] / "parameters.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


def test_a_training_that_has_failed_stops_and_keeps_what_was_good(toy, tmp_path, monkeypatch):
    failing_at(monkeypatch, *range(1, 100))
    with pytest.raises(TrainingFailed, match="5 steps in a row, up to step 6"):
        train(config(toy, tmp_path, 50))
    weights = load_file(checkpoints(tmp_path / "checkpoints")[-1] / "parameters.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())
    assert load_moa(tmp_path / "moa.safetensors").config.layers


def test_weights_that_grow_beyond_numbers_are_not_kept(toy, tmp_path):
    train(config(toy, tmp_path, 1))
    moa, kept = (tmp_path / "moa.safetensors").read_bytes(), checkpoints(tmp_path / "checkpoints")
    with pytest.raises(TrainingFailed, match=f"had grown.*last good checkpoint is {kept[-1]}"):
        train(config(toy, tmp_path, 9, lr=1e9), kept[-1])
    assert checkpoints(tmp_path / "checkpoints") == kept and (tmp_path / "moa.safetensors").read_bytes() == moa


@pytest.mark.parametrize("rate", [".nan", ".inf"])
def test_a_rate_that_is_no_number_is_refused(tmp_path, rate):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{base: a}}\ndata: {{root: b}}\nrun: {{out: c}}\noptimizer: {{lr: {rate}}}")
    with pytest.raises(ConfigError, match="optimizer.lr must be a number that is finite"):
        read_config(path)


def test_a_moa_file_of_a_failed_training_is_refused(stirred_moa, tmp_path):
    save_moa(stirred_moa, tmp_path / "moa.safetensors", torch.float32)
    weights = load_file(tmp_path / "moa.safetensors")
    name = "mixture.layers.middle_0_0_attn2.expert.to_v.weight"
    weights[name][3, 4] = math.nan
    with safe_open(tmp_path / "moa.safetensors", "pt") as file:
        save_file(weights, tmp_path / "nan.safetensors", file.metadata())
    with pytest.raises(MoAFileError, match=f"{name} holds what is no number"):
        load_moa(tmp_path / "nan.safetensors")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux which files are mapped")
def test_nothing_keeps_a_file_mapped_that_was_read(toy, stirred_moa, tmp_path):
    """On Windows such a file could be neither replaced nor removed."""
    for dtype in (torch.float32, torch.float16):
        save_moa(stirred_moa, tmp_path / f"{dtype}.safetensors", dtype)
    train(config(toy, tmp_path / "run", 1))
    moas = [load_moa(tmp_path / f"{dtype}.safetensors", dtype=dtype) for dtype in (torch.float32, torch.float16)]
    _, _, model = build(config(toy, tmp_path / "run", 1))
    parameters = trained(model)
    optimizer = torch.optim.AdamW(parameters.values())
    load_checkpoint(checkpoints(tmp_path / "run/checkpoints")[0], parameters, optimizer)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text(encoding="utf-8")
    assert moas and optimizer.state


def test_what_a_stopped_run_drew_beyond_its_checkpoint_is_drawn_once(toy, tmp_path):
    """A run killed at step 3 goes on from its checkpoint at step 2, with another batch."""
    content = config(toy, tmp_path, 3).to_dict()
    content["run"]["save_every"] = 2
    (tmp_path / "run.yaml").write_text(json.dumps(content), encoding="utf-8")
    assert main(["--config", str(tmp_path / "run.yaml")]) == 0
    last = checkpoints(tmp_path / "checkpoints")[-1]
    assert last.name == "step-00000003"
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    content["optimizer"] |= {"batch": 1, "steps": 5}
    (tmp_path / "run.yaml").write_text(json.dumps(content), encoding="utf-8")
    assert main(["--config", str(tmp_path / "run.yaml"), "--resume", "latest"]) == 0
    assert [step for step, _ in curve(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_second_run_in_a_folder_is_refused_while_the_first_one_lives(toy, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(json.dumps(config(toy, tmp_path / "run", 1).to_dict()), encoding="utf-8")
    with sole_run(tmp_path / "run"):
        assert main(["--config", str(tmp_path / "run.yaml")]) == 2
    assert "another training is writing into" in capsys.readouterr().err
    assert not (tmp_path / "run/checkpoints").exists()
    assert main(["--config", str(tmp_path / "run.yaml")]) == 0


def test_where_the_moa_file_cannot_be_written_the_checkpoint_is_named(toy, stirred_moa, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(json.dumps(config(toy, tmp_path / "run", 1).to_dict()), encoding="utf-8")
    (tmp_path / "run/moa.safetensors").mkdir(parents=True)
    (tmp_path / "run/moa.safetensors/mine").touch()
    assert main(["--config", str(tmp_path / "run.yaml")]) == 2
    assert "step-00000001 is whole: make room on the disk" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_an_error_of_the_system(stirred_moa, tmp_path):
    """Whatever safetensors calls it: all commands tell those in a sentence."""
    with pytest.raises(OSError, match="moa.safetensors could not be written"):
        save_moa(stirred_moa, tmp_path / "nowhere/moa.safetensors")


def test_a_run_does_not_go_on_beside_later_checkpoints(tmp_path):
    for step in (1, 2, 3):
        (tmp_path / f"step-0000000{step}").mkdir()
    with pytest.raises(CheckpointError, match="later than .*1: step-00000002, step-00000003"):
        find_checkpoint(tmp_path, str(tmp_path / "step-00000001"))
    assert find_checkpoint(tmp_path, str(tmp_path / "step-00000003")) == find_checkpoint(tmp_path, "latest")


def test_where_a_checkpoint_cannot_be_written_the_last_one_stays(toy, tmp_path):
    """No file may become larger than 2 MB, as on a disk that is full."""
    content = config(toy, tmp_path / "run", 1).to_dict()
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(content), encoding="utf-8")
    assert main(["--config", str(path)]) == 0
    kept = checkpoints(tmp_path / "run/checkpoints")
    before = {file: file.read_bytes() for file in kept[-1].iterdir()}
    content["optimizer"]["steps"] = 2
    path.write_text(json.dumps(content), encoding="utf-8")
    done = limited("training.train", 2_000_000, "--config", path, "--resume", "latest")
    assert done.returncode == 2, done.stderr
    assert f"the last whole checkpoint is {kept[-1]}" in done.stderr
    assert checkpoints(tmp_path / "run/checkpoints") == kept
    assert {file: file.read_bytes() for file in kept[-1].iterdir()} == before
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == [kept[-1].name]


def test_a_precision_that_does_not_work_is_named(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    with pytest.raises(ConfigError, match="bf16, which Tesla V100 does not compute in: set it to float32"):
        loop.check_precision("bf16")
    loop.check_precision("float32")


@pytest.mark.parametrize("asked", loop.ASKED)
def test_a_launcher_that_was_told_more_than_ddp_is_named(toy, tmp_path, monkeypatch, asked):
    """As `accelerate launch` tells its processes; the packages need not be there."""
    monkeypatch.setenv(asked, "true")
    with pytest.raises(ConfigError, match=f"told to use {loop.ASKED[asked]}: .*with DDP .*accelerate config"):
        train(config(toy, tmp_path, 1))


def test_what_accelerate_finds_in_its_environment_changes_no_gradient(toy, tmp_path, monkeypatch):
    train(config(toy, tmp_path / "one", 1))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    train(config(toy, tmp_path / "other", 1))
    assert curve(tmp_path / "one", "norm") == curve(tmp_path / "other", "norm")


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
import importlib
sys.exit(importlib.import_module(sys.argv[1]).main(sys.argv[3:]))
"""


def limited(module: str, size: int, *arguments: str | Path) -> subprocess.CompletedProcess:
    """A command where no file may become larger than this, on a disk or in shared memory."""
    command = [sys.executable, "-c", LIMITED, module, str(size), *map(str, arguments)]
    return subprocess.run(command, cwd=PACK, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=600)


@pytest.mark.skipif(not Path("/dev/shm").exists(), reason="shared memory that is made of files")
def test_too_little_shared_memory_is_a_sentence_and_latents_need_none(toy, tmp_path):
    content = config(toy, tmp_path / "run", 1).to_dict()
    content["data"]["workers"], content["optimizer"]["batch"] = 1, 24
    (tmp_path / "run.yaml").write_text(json.dumps(content), encoding="utf-8")
    done = limited("training.train", 2_000_000, "--config", tmp_path / "run.yaml")
    assert done.returncode == 2 and "--shm-size" in done.stderr and "Traceback" not in done.stderr, done.stderr
    shutil.copytree(toy / "data", tmp_path / "data")
    two = (toy / "data/image_ids.txt").read_text().split()[:2]
    (tmp_path / "data/image_ids.txt").write_text("\n".join(two))
    arguments = ["--data", tmp_path / "data", "--base", toy / "base.safetensors", "--size", 416, "--workers", 1]
    done = limited("training.latents", 2_000_000, *arguments)
    assert done.returncode == 0 and "2 records' latents written" in done.stdout, done.stderr


def test_a_reader_that_fails_says_its_sentence_and_ends(toy, tmp_path, capsys):
    shutil.copytree(toy / "data", tmp_path / "data")
    for picture in (tmp_path / "data").rglob("*.jpg"):
        picture.write_bytes(b"no picture")
    content = config(toy, tmp_path / "run", 1).to_dict()
    content["data"] |= {"root": str(tmp_path / "data"), "workers": 2}
    (tmp_path / "run.yaml").write_text(json.dumps(content), encoding="utf-8")
    assert main(["--config", str(tmp_path / "run.yaml")]) == 2
    said = capsys.readouterr().err
    assert "are broken, more than 1%" in said and "Traceback" not in said
    assert not multiprocessing.active_children()


def test_a_training_that_fails_leaves_no_readers_behind(toy, tmp_path, monkeypatch):
    """They ignore signals: Python would wait for them for ever, on a machine that is paid by the hour."""

    def fails(*args):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr("training.finetune.model.router_loss", fails)
    content = config(toy, tmp_path, 1).to_dict()
    content["data"]["workers"] = 1
    with pytest.raises(RuntimeError, match="out of memory") as error:
        train(config_of(tmp_path, content))
    assert error.tb and not multiprocessing.active_children()


def test_a_missing_package_for_the_eight_bit_optimizer_is_named(toy, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match="optimizer.eight_bit is true.*pip install bitsandbytes"):
        train(config(toy, tmp_path, 1, eight_bit=True))


def test_a_batch_is_small_until_it_is_on_its_device(toy):
    records = SubjectDataset(toy / "data", preparation(max_subjects=4, augment=False), "all")
    items = [records[n] for n in range(8)]
    batch = collate(items)
    size = sum(t.nbytes for t in vars(batch).values() if isinstance(t, torch.Tensor))
    whole = sum(t.nbytes for item in items for t in item.values() if isinstance(t, torch.Tensor))
    assert size < whole / 5
    there = batch.to(torch.device("cpu"))
    most = there.masks.shape[1]
    assert torch.equal(there.pictures, torch.stack([item["picture"] for item in items]))
    assert torch.equal(there.masks, torch.stack([item["masks"][:most] for item in items]))
    assert (there.references - torch.stack([item["references"][:most] for item in items])).abs().max() < 2e-3


@pytest.mark.parametrize("variant", ["fp16", None])
def test_a_folder_of_one_variant_alone_is_read(toy, tmp_path, variant):
    """As `stable-diffusion-v1-5` is often fetched: weights in half precision and no others."""
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 32), norm_num_groups=8, cross_attention_dim=768, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
    )  # fmt: skip
    text_encoder = CLIPTextModel(
        CLIPTextConfig(hidden_size=768, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    parts = {
        "unet": unet,
        "vae": AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
        "text_encoder": text_encoder,
    }
    for name, part in parts.items():
        part.half().save_pretrained(tmp_path / name, variant=variant)
    base = load_base(tmp_path)
    assert base.unet.dtype == torch.float32 and base.family == "SD 1.5"
    assert torch.equal(base.unet.conv_in.weight, unet.conv_in.weight.float())

    stored = {name: weight.clone() for name, weight in text_encoder.state_dict().items()}
    stored.pop(sorted(stored)[0])
    file = next((tmp_path / "text_encoder").glob("*.safetensors"))
    save_file(stored, file, {"format": "pt"})
    with pytest.raises(BaseError, match="text_encoder lacks 1 weights of a CLIPTextModel"):
        load_base(tmp_path)
    file.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(BaseError, match="text_encoder cannot be read as a CLIPTextModel .*fetch it again"):
        load_base(tmp_path)
    (tmp_path / "unet/config.json").write_text(json.dumps({"cross_attention_dim": 768, "in_channels": 9}))
    with pytest.raises(BaseError, match="takes 9 channels"):
        load_base(tmp_path)


def test_another_family_and_other_files_are_named(tmp_path):
    key = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    for width, message in ((1024, "is Stable Diffusion 2;"), (2048, "is SDXL;"), (99, "does not know")):
        save_file({key: torch.zeros(4, width)}, tmp_path / "checkpoint.safetensors")
        with pytest.raises(BaseError, match=message):
            load_base(tmp_path / "checkpoint.safetensors")
    for mark, family in (("joint_blocks", "Stable Diffusion 3"), ("double_blocks", "Flux")):
        save_file({f"model.diffusion_model.{mark}.0.weight": torch.zeros(4)}, tmp_path / "checkpoint.safetensors")
        with pytest.raises(BaseError, match=f"is {family};"):
            load_base(tmp_path / "checkpoint.safetensors")
    first = "model.diffusion_model.input_blocks.0.0.weight"
    inpainting = {key: torch.zeros(4, 768), first: torch.zeros(4, 9, 3, 3)}
    save_file(inpainting, tmp_path / "checkpoint.safetensors")
    with pytest.raises(BaseError, match="takes 9 channels.*Give the ordinary model"):
        load_base(tmp_path / "checkpoint.safetensors")
    save_file({key: torch.zeros(4, 768)}, tmp_path / "checkpoint.safetensors")
    with pytest.raises(BaseError, match="no autoencoder and no text encoder"):
        load_base(tmp_path / "checkpoint.safetensors")
    (tmp_path / "old.ckpt").write_bytes(b"PK")
    with pytest.raises(BaseError, match="no .safetensors checkpoint"):
        load_base(tmp_path / "old.ckpt")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").write_text(json.dumps({"cross_attention_dim": 1024}), encoding="utf-8")
    with pytest.raises(BaseError, match="is Stable Diffusion 2;"):
        load_base(tmp_path)
