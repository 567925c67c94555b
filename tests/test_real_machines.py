"""Trainings on machines as they are: numbers that run away, full disks, two at once, files that must not stay open."""

import json
import math
import os
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
from training.config import ConfigError
from training.data.batch import collate
from training.data.dataset import SubjectDataset
from training.finetune import loop, losses
from training.finetune.checkpoint import checkpoints, load_checkpoint
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
    code = "import resource, signal, sys; from training.train import main; "
    code += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, resource.RLIM_INFINITY)); "
    code += "sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "--config", str(path), "--resume", "latest"]
    done = subprocess.run(command, cwd=PACK, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert f"the last whole checkpoint is {kept[-1]}" in done.stderr
    assert checkpoints(tmp_path / "run/checkpoints") == kept
    assert {file: file.read_bytes() for file in kept[-1].iterdir()} == before
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == [kept[-1].name]


def test_a_launcher_and_a_precision_that_do_not_work_are_named(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    with pytest.raises(ConfigError, match="bf16, which Tesla V100 does not compute in: set it to float32"):
        loop.check_precision("bf16")
    loop.check_precision("float32")
    with pytest.raises(ConfigError, match="DEEPSPEED.*one device, or with DDP.*accelerate config"):
        loop.check_launcher(loop.UNSUPPORTED[0])


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


def test_another_family_and_other_files_are_named(tmp_path):
    key = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
    for width, message in ((1024, "is Stable Diffusion 2;"), (2048, "is SDXL;"), (99, "does not know")):
        save_file({key: torch.zeros(4, width)}, tmp_path / "checkpoint.safetensors")
        with pytest.raises(BaseError, match=message):
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
