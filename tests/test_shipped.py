"""The toy models that come with the pack, judged by the judges that come with them."""

import pytest
import torch

from moa_core.moa_file import load_moa
from training.comfyui import PACK
from training.host.pipeline import MoAPipeline
from training.host.pretrained import load_base
from training.toy.cases import cases, draw
from training.toy.figures import Figures, answers, assigned, judge, judge_change, preference
from training.toy.judges import Readout
from training.toy.renders import views

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


@torch.no_grad()
def test_exchanging_a_reference_changes_the_person_and_not_the_scene(pipeline, readout):
    figures = Figures()
    for case in list(cases())[:30:8]:  # one person each
        pictures = [draw(pipeline, one).pictures for one in (case, case.exchanged())]
        judge_change(figures, readout.people(pictures[0]) | readout.people(pictures[1]), *pictures)
        # Which of the two pictures shows which reference, as for two people at two places.
        own, others = answers(case), answers(case.exchanged())
        figures.add("recognised", assigned([readout(picture) for picture in pictures], [own[0], others[0]]))
        judge(figures, readout, case, pictures[0])
    ratio = figures["change outside"] / figures["change inside"]
    print(f"change outside/inside {ratio:.3f}; recognised {figures['recognised']}, scenes {figures['scene']} of 12")
    assert ratio < 0.5
    assert figures["recognised"] > 0.8  # chance 0.5
    assert figures["scene"] > 0.8  # chance 0.17


@torch.no_grad()
def test_exchanging_two_references_swaps_the_people(pipeline, readout):
    figures = Figures()
    for case in list(cases())[30:34]:
        pictures = [draw(pipeline, one).pictures for one in (case, case.exchanged())]
        before, after = (preference([readout(v) for v in views(p, 2)], answers(case)) for p in pictures)
        figures.add("swapped", before > after)
    print(f"swapped {figures['swapped']} of 12 pairs of pictures")
    assert figures["swapped"] > 0.8  # chance 0.5


def test_the_same_scene_without_people_is_the_priors(pipeline):
    case = next(cases())
    prior = draw(pipeline, case, strength=0.0).pictures
    assert torch.equal(prior, draw(pipeline, case.exchanged(), strength=0.0).pictures)
