"""Cached latents: the same step as without, kept over interruptions, and clear when they are missing."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from torch.utils.data import DataLoader
from toy_run import PACK, config, finish, start

from toy_world.shape import IMAGE_SIZE
from training.config import Config, ConfigError
from training.data.batch import Batch, Chance
from training.data.latents import check_latents, latents_of, write_latents
from training.data.layout import place
from training.data.loader import loader
from training.data.preparation import Preparation
from training.data.records import LATENTS, read_moments
from training.data.shards import write_shards
from training.finetune.loop import train
from training.finetune.model import build, trained
from training.host.base import KLAutoencoder
from training.host.pretrained import load_base
from training.latents import main
from training.train import main as train_main

LATENT = (IMAGE_SIZE // 8,) * 2
BASE = PACK / "models/checkpoints/moa-toy-base.safetensors"


@pytest.fixture
def folder(toy, tmp_path) -> Path:
    """The data set, as a copy of its own."""
    return Path(shutil.copytree(toy / "data", tmp_path / "data"))


def settings(toy: Path, root: Path, cached: bool, size: int = 0) -> Config:
    plain = config(toy, root.parent / "run", 1)
    data = dataclasses.replace(plain.data, root=str(root), size=size, smallest_crop=1.0, background="neutral")
    return dataclasses.replace(
        plain,
        model=dataclasses.replace(plain.model, base=str(BASE)),
        data=dataclasses.replace(data, cached_latents=cached),
    )


def reader(config: Config) -> DataLoader:
    return loader(config, Preparation.of(config.data, IMAGE_SIZE, 64), 0, 0, 1)


def first_batch(toy: Path, root: Path, cached: bool) -> Batch:
    return next(iter(reader(settings(toy, root, cached)))).to(torch.device("cpu"))


def kl_autoencoder() -> KLAutoencoder:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return KLAutoencoder(AutoencoderKL(**blocks, block_out_channels=(8,) * 4, norm_num_groups=4)).eval()


def test_a_step_with_cached_latents_is_the_step_without(toy, folder):
    assert main(["--data", str(folder), "--base", str(BASE), "--workers", "0"]) == 0
    plain, cached = (first_batch(toy, folder, flag) for flag in (False, True))
    assert torch.equal(plain.references, cached.references) and cached.pictures.numel() == 0  # nobody looks at them
    assert plain.moments is None and cached.moments.shape == (2, 2, 4, *LATENT)
    base, _, model = build(settings(toy, folder, True))
    chance = Chance.of(0, 0, 2, LATENT, model.loss)
    steps = []
    for batch in (plain, cached):
        loss = model(latents_of(batch, chance, base.autoencoder), batch, chance)["loss"]
        steps.append((loss.detach(), torch.autograd.grad(loss, list(trained(model).values()), allow_unused=True)))
    torch.testing.assert_close(*(loss for loss, _ in steps), rtol=1e-3, atol=0)
    norms = [sum(float(g.square().sum()) for g in gradients if g is not None) ** 0.5 for _, gradients in steps]
    assert norms[0] > 0 and norms[1] == pytest.approx(norms[0], rel=1e-2)
    train(settings(toy, folder, True))
    assert (folder.parent / "run/moa.safetensors").exists()


def test_an_autoencoders_spread_is_cached_too(toy, folder):
    autoencoder = kl_autoencoder()
    write_latents(folder, autoencoder, IMAGE_SIZE)
    plain, batch = (first_batch(toy, folder, cached) for cached in (False, True))
    noise = torch.randn(2, 4, *LATENT)
    chance = Chance.of(0, 0, 2, LATENT, settings(toy, folder, True).loss)
    expected = autoencoder.encode(plain.pictures, chance.encoding)
    assert not torch.allclose(expected, autoencoder.encode(plain.pictures, noise))
    torch.testing.assert_close(latents_of(batch, chance, autoencoder), expected, rtol=1e-2, atol=2e-3)


def test_what_is_there_is_kept_and_what_is_not_is_made(folder, caplog):
    autoencoder = kl_autoencoder()
    names = (folder / "image_ids.txt").read_text().split()
    files = [folder / name[:5] / f"{name}.latents.safetensors" for name in names]
    jpg = files[0].with_name(f"{names[0]}.jpg")
    whole = jpg.read_bytes()
    jpg.write_bytes(b"no picture")
    assert write_latents(folder, autoencoder, 32, batch=5) == len(names) - 1
    assert not files[0].exists() and names[0] in caplog.text
    jpg.write_bytes(whole)
    files[1].write_bytes(files[1].read_bytes()[:-9])
    autoencoder.vae.decoder.conv_in.weight.data += 1  # latents do not depend on it
    before = {file: file.stat().st_mtime_ns for file in files[2:]}
    assert write_latents(folder, autoencoder, 32) == 2
    assert before == {file: file.stat().st_mtime_ns for file in files[2:]}
    autoencoder.vae.encoder.conv_in.weight.data += 1
    assert write_latents(folder, autoencoder, 32) == len(names)
    with safe_open(files[0], "pt") as file:
        assert file.get_tensor("std").dtype == torch.float16 and file.get_slice("mean").get_shape() == [4, 4, 4]
    assert not list(folder.rglob("unfinished-*"))


def test_processes_share_the_records_and_go_on_after_any_other_number_of_them(folder, tmp_path):
    names = (folder / "image_ids.txt").read_text().split()
    assert write_latents(folder, load_base(BASE).autoencoder, IMAGE_SIZE) == len(names) == 24
    one = Path(shutil.copytree(folder, tmp_path / "one"))
    lacking = {names[0], *names[1::2]}  # one of the first process's names, and all of the second's
    for name in lacking:
        place(folder, name, LATENTS).unlink()
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*.latents.safetensors")}
    arguments = ["--data", folder, "--base", BASE, "--size", str(IMAGE_SIZE), "--workers", "0"]
    printed, _ = finish(start("training.latents", *arguments, processes=2))
    assert printed.count("latents written") == 1 and printed.split()[0] == "13"
    for name in lacking:
        expected, found = (read_moments(place(root, name, LATENTS), IMAGE_SIZE) for root in (one, folder))
        # Computed in other batches, the sums of some 20 layers of 9 x 64 terms round otherwise, and stored as float16 a
        # value may then go to its neighbour.
        rounding = torch.finfo(torch.float32).eps * (20 * 9 * 64) ** 0.5 * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=torch.finfo(torch.float16).eps, atol=rounding)
    assert kept == {path: path.stat().st_mtime_ns for path in kept} and not list(folder.rglob("unfinished-*"))


def test_missing_and_other_latents_are_said_in_a_sentence(toy, folder, capsys):
    run = folder.parent / "run.yaml"

    def refusal(size: int = 0) -> str:
        run.write_text(json.dumps(settings(toy, folder, True, size).to_dict()))
        assert train_main(["--config", str(run)]) == 2
        return capsys.readouterr().err

    assert "holds no latents" in (said := refusal()) and f"python -m training.latents --data {folder}" in said
    write_latents(folder, load_base(BASE).autoencoder, IMAGE_SIZE)
    assert "'size': '64'" in (said := refusal(64)) and "python -m training.latents" in said
    with pytest.raises(ConfigError, match="made with other settings"):
        check_latents(folder, kl_autoencoder(), IMAGE_SIZE)
    files = sorted(folder.rglob("*.latents.safetensors"))
    for file in files[1:]:  # a few are broken records, so many a damaged data set
        file.unlink()
    with pytest.raises(Exception, match=r"are broken.*python -m training.latents writes, found no such file"):
        for batch in reader(settings(toy, folder, True)):
            assert set(batch.captions)


def test_shards_carry_the_latents(toy, folder, tmp_path):
    autoencoder = load_base(BASE).autoencoder
    write_shards(folder, tmp_path / "bare")
    with pytest.raises(ConfigError, match="holds no latents"):
        check_latents(tmp_path / "bare", autoencoder, IMAGE_SIZE)
    write_latents(folder, autoencoder, IMAGE_SIZE)
    write_shards(folder, tmp_path / "shards")
    check_latents(tmp_path / "shards", autoencoder, IMAGE_SIZE)
    batch, plain = (first_batch(toy, tmp_path / "shards", cached) for cached in (True, False))
    expected = torch.stack(autoencoder.moments(plain.pictures), dim=1)
    torch.testing.assert_close(batch.moments, expected, rtol=1e-3, atol=1e-3)
    assert plain.moments is None
