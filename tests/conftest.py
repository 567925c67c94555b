"""Says which ComfyUI the host tests ran in, or loudly that there was none; seeds every test; shared toy models."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import find_browser
from hypothesis import HealthCheck, settings

from training.comfyui import find_comfyui, version

# A busy machine must not fail a test: no time limits. Nor may chance: the same examples in every run.
settings.register_profile("moa", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("moa")

HOST_TESTS = Path(__file__).parent / "host"


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def pytest_fixture_setup() -> None:
    """What a fixture draws does not depend on which tests ran before it."""
    seed(0)


def pytest_runtest_call() -> None:
    """Nor what a test draws; and it is not what its fixtures drew."""
    seed(1)


def pytest_collection_modifyitems(items):
    if find_comfyui() is None:
        for item in items:
            if HOST_TESTS in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="no ComfyUI found"))
    elif find_browser() is None:
        for item in items:
            if item.path.name == "test_browser.py":
                item.add_marker(pytest.mark.skip(reason="no Chromium found"))


def pytest_terminal_summary(terminalreporter):
    reports = [r for r in terminalreporter.stats.get("passed", []) if "tests/host/" in r.nodeid]
    host = find_comfyui()
    if host is None:
        terminalreporter.write_line(
            "HOST TESTS SKIPPED: no ComfyUI at COMFYUI_PATH or ~/comfy/ComfyUI; nothing was tried in the real host",
            red=True,
            bold=True,
        )
    else:
        if find_browser() is None:
            terminalreporter.write_line(
                "BROWSER TESTS SKIPPED: no Chromium or Chrome on the PATH; the frontend was not tried",
                red=True,
                bold=True,
            )
        terminalreporter.write_line(f"host tests passed: {len(reports)}, on ComfyUI {version(host)} ({host})")


def stir(moa, seed: int = 0, scale: float = 0.3):
    """Random changes to a fresh MoA, as large as training's: experts, routers and subject prompts all act."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in moa.mixture.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "router.choice" in name or "subject_prompt.mlp.3" in name:
            parameter.data += noise
        else:
            parameter.data += scale * noise * parameter.data.std().nan_to_num(0.1)
    return moa


def unsaturated(base):
    """An untrained autoencoder draws black and white alone, which hides most changes of the latents: not this one."""
    last = base.autoencoder.decoder["layers"][-1]
    last.weight.data *= 0.3
    last.bias.data.fill_(0.5)
    return base


@pytest.fixture(scope="session")
def toy_base():
    from training.host.toy_base import random_toy

    return random_toy(0)


@pytest.fixture(scope="session")
def stirred_moa(toy_base):
    from toy_world.shape import IMAGE_ENCODER

    return stir(toy_base.fresh_moa(IMAGE_ENCODER))


@pytest.fixture(scope="session")
def toy(tmp_path_factory, toy_base) -> Path:
    """A folder with an untrained base, an untrained image encoder and a few records."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    from toy_world import shape
    from training.host.toy_base import save_toy
    from training.toy.dataset import render_dataset

    folder = tmp_path_factory.mktemp("toy")
    save_toy(toy_base, folder / "base.safetensors", torch.float32)
    CLIPVisionModelWithProjection(CLIPVisionConfig(**shape.IMAGE_ENCODER)).save_pretrained(folder / "encoder")
    render_dataset(folder / "data", 24, seed=0, test_share=0.1)
    return folder


@pytest.fixture(scope="session")
def from_nothing(tmp_path_factory, toy) -> Path:
    """A folder in which all commands of training/README.md's page were run: pictures, data, a MoA file, its figures."""
    from from_nothing import go_the_way

    folder = tmp_path_factory.mktemp("from-nothing")
    go_the_way(folder, toy / "base.safetensors")
    return folder
