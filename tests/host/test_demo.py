"""The demo's pictures are the same through ComfyUI and through diffusers."""

import numpy as np
import pytest
import torch

from toy_world.shape import IMAGE_SIZE
from training.comfyui import PACK, Server, find_comfyui, make_base_directory
from training.comfyui.templates import NAMES, NEEDS_FILES
from training.demo.applications import APPLICATIONS, NOT_ONE_CALL
from training.demo.painters import ComfyUIPainter, DiffusersPainter
from training.demo.takes import MORPH, PRIOR, TOGETHER


@pytest.fixture(scope="module")
def painters(tmp_path_factory):
    base = make_base_directory(tmp_path_factory.mktemp("demo"))
    with Server(find_comfyui(), base) as server, torch.inference_mode(False):
        yield ComfyUIPainter(server), DiffusersPainter(PACK / "models")


@pytest.mark.parametrize("take", [PRIOR, TOGETHER, MORPH], ids=["prior", "together", "morph"])
def test_both_hosts_paint_the_same(painters, take):
    ours, theirs = (np.stack(painter.paint(take)[0]).astype(int) for painter in painters)
    assert ours.shape == theirs.shape == (take.frames, IMAGE_SIZE, IMAGE_SIZE, 3)
    difference = np.abs(ours - theirs)
    print(f"of 255: largest difference {difference.max()}, mean {difference.mean():.4f}")
    assert difference.max() <= 2
    if take.frames > 1:  # from the same noise the person changes, and the scene beside hardly does
        change = np.abs(ours[0] - ours[-1]).mean(axis=2)
        print(f"morph: change {change.mean():.1f}, left of the person {change[:, :24].mean():.1f}")
        assert change.mean() > 5 and change[:, :24].mean() < 0.4 * change.mean()


def test_every_application_is_drawn_in_diffusers_or_it_is_said_why_not(painters):
    _, diffusers = painters
    assert APPLICATIONS.keys() | NOT_ONE_CALL.keys() | NEEDS_FILES == set(NAMES)
    for name, why in NOT_ONE_CALL.items():
        assert why in diffusers.show(name)


@pytest.mark.parametrize("name", APPLICATIONS)
def test_an_application_in_diffusers_is_what_its_template_paints_in_comfyui(painters, name):
    theirs, ours = (painter.show(name) for painter in painters)
    assert theirs.keys() == ours.keys()
    for title in ours:
        if title == "Animation":  # ComfyUI's is a lossy WEBP
            assert len(theirs[title]) == len(ours[title])
            continue
        pair = [np.stack([np.asarray(p.convert("RGB")) for p in shown[title]]).astype(int) for shown in (ours, theirs)]
        difference = np.abs(pair[0] - pair[1])
        print(f"{title}, of 255: largest difference {difference.max()}, mean {difference.mean():.4f}")
        assert difference.max() <= (4 if title == "Swapped" else 2)  # a hundred steps there and back add up roundings
