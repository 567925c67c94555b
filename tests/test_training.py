"""The finetune: losses against hand-computed cases, learning, resuming, configuration."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from toy_run import ENVIRONMENT, PACK, config, preparation

from moa_core.address import Address
from moa_core.learned.moa_file import load_moa
from moa_core.routing.subject_area import routed_blocks
from toy_world import shape
from training.config import Augmentation, Config, ConfigError, Data, Loss, Model, Optimizer, Run, read_config
from training.data.batch import Chance, EndlessSampler, collate
from training.data.dataset import SubjectDataset
from training.data.shards import write_shards
from training.finetune import contact_sheet
from training.finetune.loop import train
from training.finetune.losses import masked_reconstruction, object_loss, router_loss, with_margin
from training.finetune.model import Finetune, trained
from training.finetune.optimizer import learning_rate
from training.host.pretrained import fresh_moa, load_base
from training.toy.dataset import render_dataset
from training.train import main

# Losses


def test_reconstruction_counts_subjects_alone_and_every_record_alike():
    predicted, noise = torch.zeros(2, 4, 2, 2), torch.zeros(2, 4, 2, 2)
    predicted[0, :, 0, 0], predicted[0, :, 1, 1] = 2.0, 9.0  # squared 4 on the subject, 81 beside it
    predicted[1] = 1.0
    subjects = torch.tensor([[[1.0, 0.0], [0.5, 0.0]], [[1.0, 1.0], [1.0, 1.0]]])
    # First record: (1 * 4 + 0.5 * 0) / 1.5; second: 1.
    weights = torch.tensor([1.0, 0.5])
    assert masked_reconstruction(predicted, noise, subjects, weights) == pytest.approx((4 / 1.5 + 0.5) / 2)


def test_a_record_without_a_subject_teaches_nothing():
    predicted = torch.ones(1, 4, 2, 2, requires_grad=True)
    loss = masked_reconstruction(predicted, torch.zeros(1, 4, 2, 2), torch.zeros(1, 2, 2), torch.ones(1))
    loss.backward()
    assert loss == 0 and predicted.grad.abs().max() == 0


def test_router_loss_is_the_squared_share_outside_summed_over_pixels():
    share = torch.tensor([[[0.5, 0.2], [0.1, 1.0]]])
    subjects = torch.tensor([[[1.0, 0.0], [0.0, 0.5]]])
    assert router_loss(share, subjects) == pytest.approx(0.2**2 + 0.1**2 + 0.5**2)


def test_object_loss_rewards_attention_on_the_own_mask():
    # Two subjects in the first record, none in the second, one in the third; 2x2 pixels, one block.
    masks = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]], [[1.0, 1.0], [0.0, 0.0]]])
    attention = {
        Address("middle", 0, 0): torch.tensor([[0.9, 0.3, 0.0, 0.0], [0.2, 0.6, 0.2, 0.6], [0.0, 0.0, 0.5, 0.5]])
    }
    # Outside minus inside: 0.1 - 0.9; 0.2 - 0.6; 0.5 - 0.
    expected = ((-0.8 - 0.4) / 2 + 0.0 + 0.5) / 3
    assert object_loss(attention, masks, torch.tensor([0, 0, 2]), 3) == pytest.approx(expected)
    assert object_loss({}, masks[:0], torch.tensor([], dtype=torch.long), 3) == 0


# Learning


class Learner:
    """One batch and its randomness, the same at every step."""

    def __init__(self, toy: Path, count: int, checkpointing: bool = False, people: int | None = None):
        self.base = load_base(toy / "base.safetensors")
        self.moa = fresh_moa(self.base, toy / "encoder")
        self.model = Finetune(self.base, self.moa, Loss(router=2e-4, object=0.1), 2)
        if checkpointing:
            self.base.unet.enable_gradient_checkpointing()
            self.base.unet.train()
        records = SubjectDataset(toy / "data", preparation(max_subjects=2, augment=False), "all")
        items = (records[n] for n in range(len(records)))
        self.items = [item for item in items if people in (None, int(item["valid"].sum()))][:count]
        self.batch = collate(self.items).to(torch.device("cpu"))
        self.chance = Chance.of(0, 0, count, (shape.IMAGE_SIZE // 8,) * 2, Loss(dropped=0.0))
        self.chance.timestep[:] = 500
        self.latents = self.base.autoencoder.encode(self.batch.pictures)

    def losses(self, batch=None) -> dict[str, torch.Tensor]:
        return self.model(self.latents, batch or self.batch, self.chance)

    def learn(self, steps: int, lr: float = 2e-3) -> None:
        optimizer = torch.optim.Adam(trained(self.model).values(), lr)
        for _ in range(steps):
            optimizer.zero_grad()
            self.losses()["loss"].backward()
            optimizer.step()


def test_one_record_is_learnt_by_heart_and_only_with_its_own_people(toy):
    learner = Learner(toy, 1, people=2)
    before = {name: p.clone() for name, p in learner.model.named_parameters()}
    start = float(learner.losses()["reconstruction"])
    learner.learn(150)
    end = float(learner.losses()["reconstruction"])
    exchanged = dataclasses.replace(learner.batch, references=learner.batch.references.flip(1))
    other = float(learner.losses(exchanged)["reconstruction"])
    print(f"masked loss {start:.4f} -> {end:.4f}; with the references exchanged {other:.4f}")
    assert end < start / 10
    assert other > 1.5 * end
    changed = {name for name, p in learner.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(trained(learner.model))
    assert not any(name.startswith(("unet.unet.", "text_encoder.")) for name in changed)
    assert any(name.startswith("image_encoder.") for name in changed)


def test_gradient_checkpointing_changes_no_gradient(toy):
    gradients = []
    for checkpointing in (False, True):
        learner = Learner(toy, 2, checkpointing)
        losses = learner.losses()
        losses["loss"].backward()
        gradients.append({n: p.grad for n, p in trained(learner.model).items()} | {"loss": losses["loss"].detach()})
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-4)


def test_a_dropped_caption_binds_nobody(toy):
    learner = Learner(toy, 2)
    learner.chance.dropped[:] = True
    losses = learner.losses()
    other = dataclasses.replace(learner.batch, references=torch.randn_like(learner.batch.references))
    assert losses["object"] == 0 and torch.equal(losses["loss"], learner.losses(other)["loss"])


@pytest.mark.parametrize("late", [False, True])
def test_a_subject_without_a_token_leaves_the_loss(toy, late):
    """Its phrase ends within a token, or beyond the 77th."""
    learner = Learner(toy, 1, people=2)
    item = dict(learner.items[0])
    if late:
        first = int(item["positions"][0])
        item["caption"] = item["caption"][:first] + " very" * 77 + item["caption"][first:]
        item["positions"] = item["positions"] + torch.tensor([0, 5 * 77])
    else:
        item["positions"] = item["positions"] - torch.tensor([0, 1])
    seen = []
    learner.model.unet.register_forward_hook(lambda module, inputs, predicted: seen.append(predicted))
    batch = collate([item]).to(torch.device("cpu"))
    losses = learner.losses(batch)
    first, second = F.interpolate(item["masks"][None], learner.latents.shape[2:], mode="area")[0, :, None]
    assert batch.positions[0, 0] >= 0 > batch.positions[0, 1] and second.sum() > 1
    expected = masked_reconstruction(seen[0], learner.chance.noise, first, torch.ones(1))
    both = masked_reconstruction(seen[0], learner.chance.noise, (first + second).clamp(max=1), torch.ones(1))
    assert losses["reconstruction"] == pytest.approx(float(expected)) != pytest.approx(float(both))


def test_the_margin_around_the_subjects_is_theirs(toy):
    """In what the experts are to learn, and in where their routers may be open."""
    learner, seen, figures = Learner(toy, 1), [], {}
    learner.model.unet.register_forward_hook(lambda module, inputs, predicted: seen.append(predicted))
    mask = F.interpolate(learner.batch.masks, learner.latents.shape[2:], mode="area").sum(dim=1)
    for margin in (0, 1, mask.shape[-1]):
        learner.model.loss = Loss(margin=margin)
        figures[margin] = learner.losses()
    for margin, area in ((0, mask), (mask.shape[-1], torch.ones_like(mask))):
        expected = masked_reconstruction(seen[-1], learner.chance.noise, area, torch.ones(1))
        assert figures[margin]["reconstruction"] == pytest.approx(float(expected))
    assert figures[0]["router"] > figures[1]["router"] > figures[mask.shape[-1]]["router"] == 0
    one = torch.zeros(1, 4, 5).index_put((torch.tensor(0), torch.tensor(0), torch.tensor(2)), torch.tensor(0.5))
    assert with_margin(one, 1).tolist() == [[[0, 0.5, 0.5, 0.5, 0]] * 2 + [[0] * 5] * 2]


def test_the_object_loss_reads_all_blocks_or_the_eleven_that_fastcomposer_reads(toy):
    learner = Learner(toy, 1, people=2)
    masks = F.interpolate(learner.batch.masks, learner.latents.shape[2:], mode="area")[0]
    for choice, blocks in (("all", slice(None)), ("routed", slice(1, -1))):
        learner.model.loss = Loss(object_blocks=choice)
        found, attention = learner.losses()["object"], learner.model.unet.call.attention
        read = {address: attention[address] for address in list(attention)[blocks]}
        assert found == pytest.approx(float(object_loss(read, masks, torch.tensor([0, 0]), 1)), rel=1e-4)
    places = [f"down_blocks.{level}.attentions.{n}" for level in (0, 1, 2) for n in range(2)]
    places += [
        "mid_block.attentions.0",
        *(f"up_blocks.{level}.attentions.{n}" for level in (1, 2, 3) for n in range(3)),
    ]
    sd15 = routed_blocks([Address.from_diffusers(f"{place}.transformer_blocks.0.", 2) for place in places])
    levels = [address.to_diffusers(2).partition(".attentions")[0] for address in sd15]
    theirs = {"down_blocks.1": 2, "down_blocks.2": 2, "mid_block": 1, "up_blocks.1": 3, "up_blocks.2": 3}
    assert Counter(levels) == theirs


# Order and randomness


@given(
    records=st.integers(1, 9),
    batch=st.integers(1, 4),
    processes=st.integers(1, 3),
    first=st.integers(0, 20),
)
def test_the_order_of_records_does_not_depend_on_the_processes(records, batch, processes, first):
    def take(count: int, size: int, passes: int) -> list:
        samplers = [iter(EndlessSampler(records, size, 7, first, process, count)) for process in range(count)]
        return [key for _ in range(passes) for sampler in samplers for key in next(sampler)]

    together = take(processes, batch, 3)
    assert together == take(1, batch * processes, 3)
    assert together == [next(iter(EndlessSampler(records, 1, 7, first + n)))[0] for n in range(len(together))]
    assert all(0 <= index < records for _, index in together)


def test_chance_belongs_to_the_record_and_keeps_its_bounds():
    whole = Chance.of(3, 40, 200, (2, 2), Loss(masked=0.5))
    part = Chance.of(3, 41, 2, (2, 2), Loss(masked=0.5))
    assert torch.equal(whole.noise[1:3], part.noise) and torch.equal(whole.timestep[1:3], part.timestep)
    assert whole.timestep.min() >= 0 and whole.timestep.max() < 800 and whole.timestep.float().std() > 150
    assert 5 <= int(whole.dropped.sum()) <= 40 and 70 <= int(whole.masked.sum()) <= 130


# Runs


def test_a_resumed_run_is_the_run_that_was_never_stopped(toy, tmp_path):
    train(config(toy, tmp_path / "whole", 4, accumulate=2))
    train(config(toy, tmp_path / "parts", 2, accumulate=2))
    train(config(toy, tmp_path / "parts", 4, accumulate=2), tmp_path / "parts/checkpoints/step-00000002")
    for file in ("parameters", "optimizer"):
        whole, parts = (
            load_file(tmp_path / f"{n}/checkpoints/step-00000004/{file}.safetensors") for n in ("whole", "parts")
        )
        assert whole.keys() == parts.keys() and all(torch.equal(whole[k], parts[k]) for k in whole)
    trained_moa = load_moa(tmp_path / "whole/moa.safetensors").config
    assert (trained_moa.base, trained_moa.timesteps) == (shape.BASE, Loss().timesteps)


def test_sigterm_saves_what_resume_latest_goes_on_from(toy, tmp_path, capsys):
    settings = tmp_path / "run.yaml"
    content = config(toy, tmp_path / "run", 10_000).to_dict()
    content["data"]["workers"] = 1
    settings.write_text(json.dumps(content))  # JSON is YAML
    command = [sys.executable, "-m", "training.train", "--config", str(settings)]
    process = subprocess.Popen(command, cwd=PACK, stderr=subprocess.PIPE, text=True, start_new_session=True)
    seen = ""
    while not re.search(r"[1-9]\d*/10000", seen):
        assert process.poll() is None, seen
        seen += process.stderr.read(1)
    os.killpg(process.pid, signal.SIGTERM)  # as a shell or a scheduler does: the readers get it too
    process.communicate(timeout=120)
    assert process.returncode == 0
    state = json.loads(next((tmp_path / "run/checkpoints").glob("step-*/state.json")).read_text())
    assert state["step"] >= 1 and load_moa(tmp_path / "run/moa.safetensors")
    assert main(["--config", str(settings)]) == 2 and "--resume latest" in capsys.readouterr().err
    again = json.loads(settings.read_text())
    again["optimizer"]["steps"] = state["step"] + 1
    settings.write_text(json.dumps(again))
    assert main(["--config", str(settings), "--resume", "latest"]) == 0
    assert f"finished at step {state['step'] + 1}" in capsys.readouterr().out


def test_a_run_streams_from_shards_goes_on_and_draws_a_contact_sheet(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(contact_sheet, "STEPS", 2)
    write_shards(toy / "data", tmp_path / "shards", records=6)
    plain = config(toy, tmp_path / "run", 1)
    settings = dataclasses.replace(
        plain,
        data=dataclasses.replace(plain.data, root=str(tmp_path / "shards"), workers=2),
        run=dataclasses.replace(plain.run, validate_every=2),
    )
    train(settings)
    settings = dataclasses.replace(settings, optimizer=dataclasses.replace(settings.optimizer, steps=2))
    train(settings, tmp_path / "run/checkpoints/step-00000001")
    assert load_moa(tmp_path / "run/moa.safetensors")
    sheet = Image.open(tmp_path / "run/step-00000002.png")
    cell = shape.IMAGE_SIZE + 2
    assert sheet.height == 6 * cell + 2 and (sheet.width - 2) % cell == 0


def test_the_rate_rises_stays_and_falls():
    optim = Optimizer(lr=1.0, warmup=4, cooldown=2, steps=8)
    assert [learning_rate(optim, step) for step in range(8)] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 0.5]
    assert {learning_rate(Optimizer(lr=2.0, steps=5), step) for step in range(5)} == {2.0}


# Bad input


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c["optimizer"].update(learning_rat=1), "section 'optimizer' has the unknown key 'learning_rat'"),
        (lambda c: c["loss"].update(droped=0.1), "'droped'; did you mean 'dropped'?"),
        (lambda c: c["optimizer"].update(lr="fast"), "optimizer.lr must be a number, found 'fast'"),
        (lambda c: c["optimizer"].update(steps=1.5), "optimizer.steps must be a whole number, found 1.5"),
        (lambda c: c["run"].update(precision="fp8"), "run.precision must be one of float32, bf16, found 'fp8'"),
        (lambda c: c["model"].pop("base"), "section 'model' lacks base"),
        (lambda c: c.update(data=[1]), r"section 'data' must hold keys and values, found \[1\]"),
        (lambda c: c["loss"].update(router=-1), "loss.router must not be negative"),
    ],
)
def test_a_wrong_configuration_is_refused_in_a_sentence(toy, tmp_path, change, message):
    content = config(toy, tmp_path).to_dict()
    change(content)
    path = tmp_path / "bad.yaml"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        read_config(path)


def test_the_shipped_configurations_are_whole_and_the_papers():
    toy, paper = (read_config(PACK / f"training/configs/{name}.yaml") for name in ("toy", "ffhq"))
    assert toy.run.file == "moa-toy.safetensors" and 0 < toy.optimizer.cooldown <= toy.optimizer.steps
    assert paper.loss == Loss(router=1e-4, object=1e-4, dropped=0.1, timesteps=800)
    theirs = Augmentation(zoom=0.5, rotation=0.75, jitter=0.5, blur=0.5, grey=0.1, flip=0.5, elastic=0.5)
    assert (paper.data.background, paper.data.appear, paper.data.augmentation) == ("noise", 0.9, theirs)
    assert paper.optimizer == Optimizer(lr=5e-5, batch=32, steps=40_000, warmup=0, cooldown=0)


@pytest.mark.parametrize("section, key", [("model", "base"), ("model", "image_encoder"), ("data", "root")])
def test_missing_files_are_named(toy, tmp_path, capsys, section, key):
    content = config(toy, tmp_path).to_dict()
    content[section][key] = str(tmp_path / "nowhere")
    (tmp_path / "run.yaml").write_text(json.dumps(content))
    assert main(["--config", str(tmp_path / "run.yaml")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_checkpoint_of_another_configuration_is_refused(toy, tmp_path, capsys):
    train(config(toy, tmp_path / "run", 1))
    content = config(toy, tmp_path / "run", 2).to_dict()
    content["model"]["router_hidden"] = 8
    (tmp_path / "run.yaml").write_text(json.dumps(content))
    assert main(["--config", str(tmp_path / "run.yaml"), "--resume", "latest"]) == 2
    assert "made with another configuration" in capsys.readouterr().err


# The real size


@pytest.mark.slow
def test_a_step_at_the_size_of_sd15(tmp_path):
    """Random weights; the peak memory is printed."""
    subprocess.run([sys.executable, PACK / "tests/sd15_folder.py", tmp_path], check=True, cwd=PACK, env=ENVIRONMENT)
    render_dataset(tmp_path / "data", 4, seed=0, test_share=0.5)
    content = Config(
        Model(str(tmp_path / "sd15"), str(tmp_path / "clip")),
        Data(str(tmp_path / "data"), size=512, workers=0),
        Run(str(tmp_path / "run"), precision="float32", checkpointing=True, validate_every=0),
        Loss(),
        Optimizer(batch=1, steps=1),
    )
    (tmp_path / "sd15.yaml").write_text(json.dumps(content.to_dict()))
    try:
        command = [sys.executable, "-m", "training.train", "--config", tmp_path / "sd15.yaml"]
        process = subprocess.Popen(command, cwd=PACK, stderr=subprocess.PIPE, text=True)
        progress = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0, progress[-3000:]
        print(f"peak memory {usage.ru_maxrss / 2**20:.1f} GiB; {progress.splitlines()[-1]}")
        moa = load_moa(tmp_path / "run/moa.safetensors")
        assert moa.config.base == "SD 1.5" and len(moa.config.blocks) == 16
        moments = load_file(next(tmp_path.glob("run/checkpoints/step-*/optimizer.safetensors")))
        first = {name: float(value.abs().max()) for name, value in moments.items() if name.startswith("exp_avg.")}
        # What is computed from the routers' neutral start reaches every expert's output; the rest follows from there.
        experts = [value for name, value in first.items() if "expert.to_out" in name]
        assert len(experts) == 64 and min(experts) > 0
    finally:
        shutil.rmtree(tmp_path / "sd15")
