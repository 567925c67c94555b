"""AdamW with moments of 8 bits, where bitsandbytes is installed; it computes on a CPU, too."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy_run import config

from training.finetune.checkpoint import CheckpointError, checkpoints
from training.finetune.loop import train

pytest.importorskip("bitsandbytes", reason="the 8-bit AdamW is optional: pip install bitsandbytes")


def last(out: Path) -> Path:
    return checkpoints(out / "checkpoints")[-1]


@pytest.fixture(scope="module")
def runs(toy, tmp_path_factory) -> Path:
    """Two steps of either optimizer."""
    folder = tmp_path_factory.mktemp("runs")
    for name, eight_bit in (("plain", False), ("small", True)):
        train(config(toy, folder / name, 2, eight_bit=eight_bit))
    return folder


def test_a_resumed_run_is_the_run_that_was_never_stopped(toy, runs, tmp_path):
    train(config(toy, tmp_path / "whole", 4, eight_bit=True))
    train(config(toy, tmp_path / "parts", 4, eight_bit=True), last(runs / "small"))
    for file in ("parameters.safetensors", "optimizer.safetensors"):
        whole, parts = (load_file(last(tmp_path / name) / file) for name in ("whole", "parts"))
        assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)


def test_it_learns_what_adamw_learns_with_small_moments(runs):
    plain, small = (load_file(last(runs / name) / "parameters.safetensors") for name in ("plain", "small"))
    apart = torch.cat([(plain[name] - small[name]).abs().flatten() for name in plain])
    # Two steps at a rate of 1e-3 move a weight by 2e-3 at most.
    print(f"after two steps a weight is {apart.mean():.1e} from AdamW's on average")
    assert 0 < apart.mean() < 5e-5
    sizes = [(last(runs / name) / "optimizer.safetensors").stat().st_size for name in ("plain", "small")]
    assert sizes[1] < 0.4 * sizes[0]


@pytest.mark.parametrize("made, switched, message", [
    ("plain", True, "moments of AdamW, which AdamW8bit cannot read: set optimizer.eight_bit to false"),
    ("small", False, "moments of AdamW8bit, which AdamW cannot read: set optimizer.eight_bit to true"),
])  # fmt: skip
def test_a_checkpoint_of_the_other_optimizer_is_refused(toy, runs, tmp_path, made, switched, message):
    with pytest.raises(CheckpointError, match=message):
        train(config(toy, tmp_path, 4, eight_bit=switched), last(runs / made))
