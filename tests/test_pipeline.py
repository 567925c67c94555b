"""Sampling in diffusers."""

import pytest
import torch
from conftest import unsaturated

from moa_core.subject import Subject
from toy_world.shape import IMAGE_ENCODER
from training.host.pipeline import MoAPipeline
from training.host.toy_base import random_toy

PROMPT = "a man and a woman on a beach"
QUICK = {"steps": 3, "cfg": 3.0, "seed": 5}


def pipeline(moa) -> MoAPipeline:
    return MoAPipeline(unsaturated(random_toy(0)), moa)  # a U-Net of its own: a pipeline hangs its MoA onto it


def person(seed: int, word: str) -> Subject:
    return Subject(torch.randn(1, 64, generator=torch.Generator().manual_seed(seed)), word, word)


@pytest.mark.parametrize("sampler", ["uni_pc", "euler"])
def test_the_three_term_guidance_has_the_prior_and_the_plain_guidance_as_its_ends(toy_base, stirred_moa, sampler):
    people, options = [person(1, "man"), person(2, "woman")], QUICK | {"sampler": sampler}
    acting = pipeline(stirred_moa)
    prior, _ = acting(PROMPT, people, strength=0.0, **options)
    torch.testing.assert_close(acting(PROMPT, people, subject_cfg=0.0, **options)[0], prior)
    drawn, _ = acting(PROMPT, people, subject_cfg=3.0, **options)
    assert (drawn - prior).abs().max() > 1e-3
    fresh = pipeline(toy_base.fresh_moa(IMAGE_ENCODER))
    torch.testing.assert_close(fresh(PROMPT, people, subject_cfg=3.0, **options)[0], prior, atol=1e-4, rtol=0)


def test_a_batch_paints_every_variant(stirred_moa):
    variants = torch.cat([person(seed, "man").features for seed in range(3)])
    pictures, trace = pipeline(stirred_moa)(PROMPT, [Subject(variants, "man", "")], batch=3, **QUICK)
    assert pictures.shape == (3, 128, 128, 3) and trace.subject_area().shape == (3, 16, 16)
    again, _ = pipeline(stirred_moa)(PROMPT, [Subject(variants.flip(0), "man", "")], batch=3, **QUICK)
    torch.testing.assert_close(again[1], pictures[1])
    assert (again[0] - pictures[0]).abs().max() > 1e-3
