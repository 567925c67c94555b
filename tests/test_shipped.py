"""The toy models that come with the pack, judged by the judges that come with them."""

import pytest
import torch

from moa_core.moa_file import load_moa
from training.base import load_base
from training.comfyui import PACK
from training.pipeline import MoAPipeline
from training.toy.measure import Figures, cases, draw, judge, judge_change
from training.toy.readout import Readout

BASE, MOA = PACK / "models/checkpoints/moa-toy-base.safetensors", PACK / "models/moa/moa-toy.safetensors"


@pytest.fixture(scope="module")
def pipeline():
    return MoAPipeline(load_base(BASE), load_moa(MOA))


@pytest.fixture(scope="module")
def readout():
    return Readout.load()


def test_they_are_small_enough_to_clone():
    assert BASE.stat().st_size + MOA.stat().st_size <= 24e6
    assert BASE.with_suffix(".md").exists() and MOA.with_suffix(".md").exists()


def test_exchanging_a_reference_changes_the_person_and_not_the_scene(pipeline, readout):
    figures = Figures()
    for case in list(cases())[:30:10]:  # three places, one person each
        a, b = (draw(pipeline, one).pictures for one in (case, case.exchanged()))
        judge_change(figures, readout.people(a) | readout.people(b), a, b)
        judge(figures, "moa", readout, case, a)
    ratio = figures["change.outside"] / figures["change.inside"]
    print(f"change outside/inside {ratio:.3f}; skin {figures['moa.skin']}, hair {figures['moa.hair']} of 9 pictures")
    assert ratio < 0.5
    # Chance is 1/6 each.
    assert figures["moa.skin"] >= 0.5 and figures["moa.hair"] >= 0.5 and figures["moa.scene"] >= 0.8


def test_exchanging_two_references_swaps_the_people(pipeline, readout):
    figures = Figures()
    for case in list(cases())[30:33]:
        for one in (case, case.exchanged()):
            judge(figures, "moa", readout, one, draw(pipeline, one).pictures)
    print(f"two people at the right words: {figures['moa.assigned']} of 18 pictures")
    assert figures["moa.assigned"] > 0.75  # chance 0.5; 14 of 18 happen by chance once in 65 times


def test_the_same_scene_without_people_is_the_priors(pipeline):
    case = next(cases())
    prior = draw(pipeline, case, strength=0.0).pictures
    assert torch.equal(prior, draw(pipeline, case.exchanged(), strength=0.0).pictures)
