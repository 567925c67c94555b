"""Training the toy base model, and the figures by which a MoA is judged."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderTiny

from toy_world import shape
from training.host.lora import read_lora
from training.host.narrow_vae import NarrowVAE
from training.host.pretrained import fresh_moa, load_base
from training.host.tokenizer import tokenize
from training.host.toy_base import load_toy, save_toy
from training.toy.cases import Case, cases
from training.toy.figures import GROW, Figures, assigned, judge_change, judge_routers
from training.toy.judges import Readout
from training.toy.pretrain import controlnet, loop, person_lora, style_lora
from training.toy.pretrain.autoencoder import train_vae
from training.toy.pretrain.controlnet import train_controlnet
from training.toy.pretrain.encoder import train_encoder
from training.toy.pretrain.judges import readout_loss
from training.toy.pretrain.loop import Plan, read
from training.toy.pretrain.person_lora import train_person_lora
from training.toy.pretrain.style_lora import train_style_lora
from training.toy.pretrain.unet import PROMPTS, assemble, train_unet
from training.toy.renders import ATTRIBUTES, views

SMALL = dict(batch=2, scenes=24)


@pytest.fixture(autouse=True)
def sketches(monkeypatch):
    """Contact sheets of few steps: no test looks at what is on them."""
    for part in ("unet", "on_base"):
        monkeypatch.setattr(f"training.toy.pretrain.{part}.STEPS", 2)


def test_a_widened_autoencoder_is_the_same_function():
    torch.manual_seed(0)
    narrow = NarrowVAE()
    for parameter in narrow.parameters():  # blocks begin as the identity, biases as zero
        parameter.data += 0.05 * torch.randn_like(parameter)
    again = NarrowVAE.of(narrow.widen())
    assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in narrow.state_dict().items())
    with pytest.raises(ValueError, match="wider than the toy world's"):
        NarrowVAE.of(AutoencoderTiny())
    wide, narrow = narrow.widen().double(), narrow.double()  # so that only a difference of meaning shows
    pictures = torch.rand(2, 3, 64, 48, dtype=torch.float64) * 2 - 1
    latents = narrow.encode(pictures)
    assert latents.abs().max() > 0.1
    torch.testing.assert_close(wide.encode(pictures).latents, latents)
    torch.testing.assert_close(wide.decode(3 * latents).sample, narrow.decode(3 * latents))


def test_a_resumed_training_is_the_one_that_was_never_stopped_and_gives_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("training.toy.pretrain.autoencoder.HELD_OUT", 16)
    monkeypatch.setattr("training.toy.pretrain.unet.HELD_OUT", 16)
    monkeypatch.setattr("training.toy.pretrain.unet.PROMPTS", PROMPTS[:1])
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for train, name in ((train_vae, "vae"), (train_unet, "unet")):
        train(Plan(whole, 4, **SMALL))
        with monkeypatch.context() as stopped:
            stopped.setattr("training.toy.pretrain.loop.generator", stop_after(1))
            train(Plan(halves, 4, **SMALL))
        assert read(halves / f"{name}.safetensors")[1]["step"] == 2
        train(Plan(halves, 4, resume=True, **SMALL))
        (a, done), (b, resumed) = read(whole / f"{name}.safetensors"), read(halves / f"{name}.safetensors")
        assert done["step"] == resumed["step"] == 4
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    with pytest.raises(ValueError, match="--resume"):
        train_vae(Plan(whole, 4, **SMALL))
    with pytest.raises(ValueError, match="of a run with --steps 4, not 5"):
        train_vae(Plan(whole, 5, resume=True, **SMALL))

    assemble(whole, tmp_path / "base.safetensors")
    base, average = load_toy(tmp_path / "base.safetensors"), averaged(whole / "unet.safetensors")
    words = base.text_encoder.get_input_embeddings().weight
    for part in ("unet", "text_encoder"):
        for name, weight in getattr(base, part).state_dict().items():
            if not torch.equal(weight, words):
                assert torch.equal(weight, average[f"{part}.{name}"].half().float()), name
    captions = json.loads((whole / "pictures.json").read_text())["captions"]
    said = sorted({token for caption in captions for token in tokenize(caption)})
    learnt = next(weight for name, weight in average.items() if name.endswith("token_embedding.weight"))
    assert torch.equal(words[said], learnt[said].half().float()) and len(said) > 20
    assert words.count_nonzero(dim=1).nonzero().flatten().tolist() == said  # all others are zero
    pictures = torch.rand(1, 3, 64, 64) * 2 - 1
    narrow = NarrowVAE()
    narrow.load_state_dict({name: v.half().float() for name, v in averaged(whole / "vae.safetensors").items()})
    torch.testing.assert_close(base.autoencoder.encode(pictures), narrow.encode(pictures), atol=1e-3, rtol=1e-3)


def test_a_base_model_goes_on_from_the_weights_of_another(tmp_path, toy_base, monkeypatch):
    monkeypatch.setattr("training.toy.pretrain.unet.PROMPTS", PROMPTS[:1])
    for part in ("autoencoder", "unet"):
        monkeypatch.setattr(f"training.toy.pretrain.{part}.HELD_OUT", 16)
    save_toy(toy_base, tmp_path / "base.safetensors")
    start, still = load_toy(tmp_path / "base.safetensors"), SMALL | {"base": tmp_path / "base.safetensors", "lr": 0.0}
    train_vae(Plan(tmp_path / "run", 1, **still))
    train_unet(Plan(tmp_path / "run", 1, **still))
    for name, weight in start.autoencoder.state_dict().items():
        assert torch.equal(weight, averaged(tmp_path / "run/vae.safetensors")[name]), name
    for name, weight in start.unet.state_dict().items():
        assert torch.equal(weight, averaged(tmp_path / "run/unet.safetensors")[f"unet.{name}"]), name


def test_controlnet_and_lora_learn_beside_a_base_that_stays(tmp_path, toy_base, monkeypatch):
    """Resumed they are what they would have been, and what they learn comes out as small files."""
    monkeypatch.setattr("training.toy.pretrain.on_base.HELD_OUT", 16)
    save_toy(toy_base, tmp_path / "base.safetensors")
    small = SMALL | {"base": tmp_path / "base.safetensors"}
    for train, name, file, megabytes in (
        (train_controlnet, "controlnet", controlnet.FILE, 3.0),
        (train_style_lora, "style-lora", style_lora.FILE, 0.3),
    ):
        module = f"training.toy.pretrain.{train.__module__.rsplit('.')[-1]}"
        monkeypatch.setattr(f"{module}.PROMPTS", PROMPTS[:1])
        whole, halves = tmp_path / f"{name} whole", tmp_path / f"{name} halves"
        train(Plan(whole, 3, **small))
        with monkeypatch.context() as stopped:
            stopped.setattr("training.toy.pretrain.loop.generator", stop_after(0))
            train(Plan(halves, 3, **small))
        train(Plan(halves, 3, resume=True, **small))
        (a, _), (b, _) = read(whole / f"{name}.safetensors"), read(halves / f"{name}.safetensors")
        assert all(torch.equal(a[key], b[key]) for key in a)
        names = {key.split(".", 1)[1] for key in a if key.startswith("model.")}
        assert names and not any("base_layer" in key or key.startswith("text_encoder") for key in names)
        assert (whole / file).stat().st_size <= megabytes * 1e6
        assert (whole / file).read_bytes() == (halves / file).read_bytes()
    with pytest.raises(ValueError, match="elsewhere.safetensors does not exist: give --base"):
        train_style_lora(Plan(tmp_path, 1, **SMALL, base=tmp_path / "elsewhere.safetensors"))


def test_a_persons_lora_is_of_that_person_and_small(tmp_path, toy_base, monkeypatch):
    monkeypatch.setattr("training.toy.pretrain.on_base.HELD_OUT", 8)
    monkeypatch.setattr("training.toy.pretrain.person_lora.HELD_OUT", 8)
    monkeypatch.setattr("training.toy.pretrain.person_lora.PICTURES", 8)
    save_toy(toy_base, tmp_path / "base.safetensors")
    files = []
    for run, person, gamma in (("one", 18, 0.3), ("again", 18, 0.3), ("other", 8, 0.3), ("weighted", 18, 5.0)):
        monkeypatch.setattr("training.toy.pretrain.person_lora.GAMMA", gamma)
        plan = Plan(tmp_path / run, 2, batch=4, base=tmp_path / "base.safetensors")
        train_person_lora(plan, "man", person)
        files.append((tmp_path / run / f"man-{person}.safetensors").read_bytes())
    assert files[0] == files[1] and len({*files}) == 3 and len(files[0]) <= 450_000
    changed = read_lora(toy_base.unet, tmp_path / "one/man-18.safetensors")
    assert len(changed) == 84 and all(any(part in name for part in person_lora.LAYERS) for name in changed)


def stop_after(last: int):
    """The loop's source of randomness, which ends the training as a signal does, after this step."""

    def generator(seed: int, step: int) -> torch.Generator:
        if step == last:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(seed, step)

    real = loop.generator
    return generator


def test_every_pretraining_ends_in_a_falling_rate(tmp_path):
    rates = [Plan(tmp_path, 1000, lr=2.0).rate(step) for step in range(1000)]
    assert rates[99] == max(rates) and rates[:100] == sorted(rates[:100]) and rates[99:] == sorted(rates[99:])[::-1]
    assert 1.9 < rates[99] < 2.0 and rates[500] == pytest.approx(1.0) and rates[999] < 1e-5


def test_the_image_encoder_becomes_a_folder_that_a_finetune_starts_from(tmp_path, toy_base, monkeypatch):
    monkeypatch.setattr("training.toy.pretrain.encoder.TEST", 16)
    train_encoder(Plan(tmp_path / "run", 2, **SMALL))
    save_toy(toy_base, tmp_path / "base.safetensors")
    moa = fresh_moa(load_base(tmp_path / "base.safetensors"), tmp_path / "run/encoder")
    average = averaged(tmp_path / "run/encoder.safetensors")
    for name, weight in moa.image_encoder.state_dict().items():
        assert torch.equal(weight, average[name]), name
    assert moa.config.image_encoder.items() >= shape.IMAGE_ENCODER.items()


def averaged(path):
    return {k.removeprefix("average."): v for k, v in read(path)[0].items() if k.startswith("average.")}


def test_the_judges_learn_what_can_be_told_apart():
    torch.manual_seed(0)
    readout, side = Readout(), shape.IMAGE_SIZE
    number = torch.arange(8)
    answers = {name: number % len(values) for name, values in ATTRIBUTES.items()}
    pictures = torch.randn(8, 3, side, side) * 0.3
    people = torch.zeros(8, side, side, dtype=torch.bool)
    people[:, side // 4 : -side // 4, side // 4 : side // 2] = True
    pictures[:, 1] += people * 1.5
    optimizer = torch.optim.Adam(readout.parameters(), lr=2e-3)
    for _ in range(40):
        optimizer.zero_grad()
        readout_loss(readout, pictures, answers, pictures, people).backward()
        optimizer.step()
    readout.eval()
    for name, logits in readout(pictures).items():
        assert torch.equal(logits.argmax(dim=1), answers[name]), name
    found = readout.people(pictures)
    assert (found & people).sum() / (found | people).sum() > 0.9


def test_two_people_are_looked_at_in_their_own_halves():
    picture = torch.arange(8.0).expand(1, 3, 8, 8)
    left, right = views(picture, 2)
    assert left[0, 0, 0].tolist() == [0, 0, 0, 1, 2, 3, 0, 0]
    assert right[0, 0, 0].tolist() == [0, 0, 4, 5, 6, 7, 0, 0]


def test_change_is_told_apart_inside_and_outside_the_people():
    people = torch.zeros(1, 32, 32, dtype=torch.bool)
    people[:, 8:16, 8:16] = True
    a = torch.zeros(1, 3, 32, 32)
    figures = Figures()
    judge_change(figures, people, a, a)
    assert figures["change inside"] == figures["change outside"] == 0.0
    b = a.clone()
    b[:, :, 8 - GROW : 16 + GROW, 8 - GROW : 16 + GROW] = 1.0  # the people and the pixels around them
    figures = Figures()
    judge_change(figures, people, a, b)
    assert figures["change inside"] == 0.5 and figures["change outside"] == 0.0  # half of the range -1..1
    assert Figures()["change inside"] is None


def test_router_shares_are_taken_where_the_people_are():
    people = torch.zeros(1, 32, 32, dtype=torch.bool)
    people[:, :, 16:] = True
    area = torch.full((1, 4, 4), 0.1)
    area[:, :, 2:] = 0.7
    figures = Figures()
    judge_routers(figures, people, area)
    assert figures.all() == pytest.approx({"router inside": 0.7, "router outside": 0.1})


def test_exchanged_people_are_noticed():
    wanted = [[{name: who for name in ATTRIBUTES} for _ in range(3)] for who in (0, 1)]
    sure = torch.tensor([[2.0, -2.0]]).expand(3, 2)
    first, second = ({name: sign * sure for name in ATTRIBUTES} for sign in (1, -1))
    assert assigned([first, second], wanted).all()
    assert not assigned([second, first], wanted).any()


def test_prompts_cover_the_world_and_exchanging_references_changes_every_person():
    everything = list(cases())
    singles = [case for case in everything if len(case.references) == 1]
    assert len({(case.scene.place, case.scene.people[0].action) for case in singles}) == 30
    assert {case.scene.people[0].age for case in singles} == {"kid", "adult", "old"}
    for case in everything:
        other: Case = case.exchanged()
        assert other.scene == case.scene and other.seed == case.seed
        for old, new in zip(case.references, other.references, strict=True):
            assert all(a != b and a.held_out for a, b in zip(old, new, strict=True))
    pair = everything[-1]
    assert pair.exchanged().references == [pair.references[1], pair.references[0]]
    assert replace(pair, seed=1) != pair
