"""Experts in some layers alone: the file, what the layers without one do, how they are found, and training them on."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from test_training import config
from torch.testing import assert_close

from moa_core.address import Address
from moa_core.learned.moa import MoA, MoAConfig
from moa_core.learned.moa_file import load_moa, save_moa
from moa_core.learned.unet_call import BoundTokens
from training.evaluation import vital_layers
from training.host.adapter import MoAUNet
from training.toy import cases
from training.train import main as train
from training.vital import main as vital

KEPT = [(Address.parse(name), attention) for name, attention in (
    ("output.0.0", "attn2"), ("output.1.0", "attn1"), ("output.2.0", "attn2")
)]  # fmt: skip


@pytest.fixture
def few(stirred_moa) -> MoA:
    return stirred_moa.with_experts_in(KEPT)


def test_the_file_says_which_layers_hold_an_expert_and_a_whole_one_is_as_it_always_was(few, stirred_moa, tmp_path):
    for moa, version in ((few, "2"), (stirred_moa, "1")):
        save_moa(moa, tmp_path / "moa.safetensors", torch.float32)
        with safe_open(tmp_path / "moa.safetensors", "pt") as file:
            metadata = file.metadata()
        assert metadata["format_version"] == version
        assert ("layers" in json.loads(metadata["config"])) == (version == "2")
        read = load_moa(tmp_path / "moa.safetensors")
        assert read.config == moa.config == MoAConfig.from_json(json.loads(metadata["config"]))
        for name, weight in moa.state_dict().items():
            assert torch.equal(read.state_dict()[name], weight)
    assert list(few.config.layers) == KEPT  # in the order of the forward pass
    assert sum(p.numel() for p in few.mixture.parameters()) < 0.4 * sum(
        p.numel() for p in stirred_moa.mixture.parameters()
    )


@pytest.mark.parametrize(
    "layers, message",
    [
        ([(Address.parse("output.9.0"), "attn2")], "output.9.0.attn2"),
        ([(Address.parse("output.1.0"), "attn1")], "no cross-attention"),
    ],
)
def test_layers_that_a_moa_cannot_do_with_are_named(stirred_moa, layers, message):
    with pytest.raises(ValueError, match=message):
        stirred_moa.with_experts_in(layers)


@torch.no_grad()
def test_a_layer_without_an_expert_is_the_priors(toy_base, stirred_moa, few):
    """As a whole MoA whose other routers leave everything to the prior."""
    whole = copy.deepcopy(stirred_moa)
    for layer in whole.config.layers:
        if layer not in KEPT:
            choice = whole.mixture.layer(*layer).router.choice
            choice.weight.zero_()
            choice.bias.copy_(torch.tensor([60.0, -60.0]))
    latents, timestep, context = torch.randn(2, 4, 16, 16), torch.tensor([500.0, 20.0]), torch.randn(2, 77, 64)
    bound = BoundTokens.stack([(0, 3, torch.randn(64)), (1, 5, torch.randn(64))])
    out = {}
    for name, moa in (("few", few), ("whole", whole)):
        unet = MoAUNet(toy_base.unet, moa.mixture)
        out[name] = unet(latents, timestep, context, bound)
    out["prior"] = unet.run(latents, timestep, context, None)
    assert_close(out["few"], out["whole"], atol=1e-5, rtol=0)
    assert (out["few"] - out["prior"]).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["MoA toy", "SD 1.5"])
def test_vital_layers_are_found_kept_and_trained_on(toy, few, tmp_path, capsys, monkeypatch, family):
    """By the toy world's judges; and, as for a base model of any other family, by the MoA's own image encoder."""
    monkeypatch.setattr("training.vital.TOY", "MoA toy" if family == "MoA toy" else "another")
    monkeypatch.setattr(vital_layers, "STEPS", 3)
    monkeypatch.setattr(cases, "STEPS", 3)
    save_moa(few, tmp_path / "few.safetensors", torch.float32)
    command = ["--base", str(toy / "base.safetensors"), "--moa", str(tmp_path / "few.safetensors")]
    command += ["--data", str(toy / "data"), "--prompts", "1", "--out", str(tmp_path / "vital.safetensors")]
    assert vital([*command, "--keep", "2"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    moved = {line[0]: float(line[1]) for line in lines if line and line[0].startswith("output")}
    assert list(moved) == [f"{address}.{attention}" for address, attention in KEPT] and min(moved.values()) > 0
    kept = load_moa(tmp_path / "vital.safetensors").config.layers
    assert sorted(f"{a}.{attention}" for a, attention in kept) == sorted(sorted(moved, key=moved.get)[1:])

    assert vital([*command, "--loss", "1e9"]) == 0  # whatever it costs: one voice is left to the subjects
    (last,) = load_moa(tmp_path / "vital.safetensors").config.layers
    assert last[1] == "attn2" and (tmp_path / "vital.yaml").is_file()
    refused = ((["--keep", "9"], "--keep is 9"), (["--keep", "0"], "--keep is 0"), (["--prompts", "0"], "--prompts 0"))
    for much, message in refused:
        assert vital([*command, *much]) == 2
        assert message in capsys.readouterr().err


def test_a_training_starts_from_a_moa_file(toy, few, tmp_path, capsys):
    save_moa(few, tmp_path / "start.safetensors", torch.float32)
    content = config(toy, tmp_path / "run", 2).to_dict()
    content["model"] |= {"start": str(tmp_path / "start.safetensors"), "image_encoder": ""}
    content["optimizer"]["lr"] = 1e-6
    (tmp_path / "run.yaml").write_text(json.dumps(content))
    assert train(["--config", str(tmp_path / "run.yaml")]) == 0
    learnt = load_moa(tmp_path / "run" / content["run"]["file"])
    assert learnt.config.layers == few.config.layers
    card = (tmp_path / "run" / content["run"]["file"]).with_suffix(".md").read_text(encoding="utf-8")
    assert "2 steps, 4 records in all, from the weights of `start.safetensors`" in card and "output.1.0.attn1" in card
    for name, weight in few.mixture.state_dict().items():
        assert_close(learnt.mixture.state_dict()[name], weight, atol=2e-3, rtol=1e-3)

    content["model"]["start"] = str(tmp_path / "nowhere.safetensors")
    (tmp_path / "run.yaml").write_text(json.dumps(content | {"run": content["run"] | {"out": str(tmp_path / "new")}}))
    assert train(["--config", str(tmp_path / "run.yaml")]) == 2
    assert "model.start" in capsys.readouterr().err
