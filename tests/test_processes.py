"""The finetune over several processes, and over crashes."""

import dataclasses
import itertools
import json
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file
from toy_run import config, curve, finish
from toy_run import start as start_command

from moa_core.learned.moa_file import load_moa
from training.config import Config
from training.finetune.checkpoint import checkpoints
from training.finetune.loop import train
from training.host.pretrained import fresh_moa, load_base


def start(settings: Config, path, *arguments: str, processes: int = 1) -> subprocess.Popen:
    path.write_text(json.dumps(settings.to_dict()))
    return start_command("training.train", "--config", path, *arguments, processes=processes)


def run(*arguments, **others) -> None:
    finish(start(*arguments, **others))


def parameters(folder, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoints/step-{step:08d}/parameters.safetensors")


def test_processes_share_a_batch_and_may_change_their_number_between_runs(toy, tmp_path):
    settings = tmp_path / "run.yaml"
    train(config(toy, tmp_path / "one", 4, batch=4))
    run(config(toy, tmp_path / "two", 2, batch=2), settings, processes=2)
    # The same four records a step, now in one process and two passes.
    train(config(toy, tmp_path / "two", 4, batch=2, accumulate=2), checkpoints(tmp_path / "two/checkpoints")[-1])
    one, two = parameters(tmp_path / "one", 4), parameters(tmp_path / "two", 4)
    difference = max(float((one[name] - two[name]).abs().max()) for name in one)
    moved = max(float((one[name] - parameters(tmp_path / "two", 2)[name]).abs().max()) for name in one)
    print(f"largest difference {difference:.2e}; two steps moved parameters by {moved:.2e}")
    # Adam divides by a gradient's size, so that rounding shows where a gradient is nearly zero.
    worst = max(float((one[name] - two[name]).abs().mean()) for name in one)
    assert worst < 1e-5 and moved > 1e-3


def test_another_number_of_processes_goes_on_with_the_record_after_the_last(toy, tmp_path):
    """At a rate of 0 nothing is learnt: the loss of a step tells which record the main process read."""
    train(config(toy, tmp_path / "each", 6, batch=1, lr=0.0))
    each = [loss for _, loss in curve(tmp_path / "each")]
    run(config(toy, tmp_path / "run", 2, batch=1, lr=0.0), tmp_path / "run.yaml", processes=2)
    (tmp_path / "run/moa.md").unlink()
    train(config(toy, tmp_path / "run", 4, batch=1, lr=0.0), checkpoints(tmp_path / "run/checkpoints")[-1])
    expected = enumerate((each[0], each[2], each[4], each[5]), start=1)
    assert curve(tmp_path / "run") == [(step, pytest.approx(loss, rel=1e-4)) for step, loss in expected]
    assert min(abs(a - b) for a, b in itertools.combinations(each, 2)) > 1e-3
    assert "4 steps, 6 records in all" in (tmp_path / "run/moa.md").read_text(encoding="utf-8")


def test_bf16_with_gradient_checkpointing_trains_as_float32_does(toy, tmp_path):
    """In a process of its own: accelerate keeps one precision for the life of a process."""
    settings = config(toy, tmp_path / "float32", 2)
    run(settings, tmp_path / "run.yaml")
    bf16 = dataclasses.replace(settings.run, out=str(tmp_path / "bf16"), precision="bf16", checkpointing=True)
    run(dataclasses.replace(settings, run=bf16), tmp_path / "run.yaml")
    exact, rough = (load_moa(tmp_path / name / "moa.safetensors").state_dict() for name in ("float32", "bf16"))
    start = fresh_moa(load_base(toy / "base.safetensors"), toy / "encoder").state_dict()
    moved = mean_change(start, exact)
    apart = mean_change(exact, rough)
    print(f"two steps move a weight by {moved:.1e} on average; with bf16 it ends {apart:.1e} beside")
    assert 0 < apart < 0.5 * moved


def mean_change(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([(a[name].float() - b[name].float()).abs().flatten() for name in a]).mean())


def test_a_run_killed_at_any_moment_goes_on_from_its_last_whole_checkpoint(toy, tmp_path):
    settings = config(toy, tmp_path / "run", 100_000, batch=1)
    settings = dataclasses.replace(settings, run=dataclasses.replace(settings.run, save_every=1))
    folder, seen, arguments = tmp_path / "run/checkpoints", 0, ()
    for delay in (0.0, 0.07, 0.19):
        process = start(settings, tmp_path / "run.yaml", *arguments)
        while len(checkpoints(folder)) < 2 or steps(folder)[-1] < seen + 2:
            assert process.poll() is None, process.stderr.read()[-3000:]
            time.sleep(0.01)
        time.sleep(delay)
        process.kill()
        process.communicate()
        seen, arguments = steps(folder)[-1], ("--resume", "latest")
        assert len(parameters(tmp_path / "run", seen)) > 100
    # A write that was cut short leaves a folder under another name, which the next run clears away.
    (folder / "unfinished-step-00999999").mkdir()
    last = dataclasses.replace(settings, optimizer=dataclasses.replace(settings.optimizer, steps=seen + 1))
    run(last, tmp_path / "run.yaml", *arguments)
    assert steps(folder)[-1] == seen + 1 and not list(folder.glob("unfinished-*"))


def steps(folder) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoints(folder)]
