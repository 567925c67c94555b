"""Sampling in diffusers."""

import dataclasses

import pytest
import torch
from conftest import unsaturated
from diffusers import ControlNetModel

from moa_core.learned.moa import MoA
from moa_core.subjects.subject import Subject
from toy_world.shape import IMAGE_ENCODER, IMAGE_SIZE
from training.host.pipeline import MoAPipeline, controlled_by
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


@pytest.mark.parametrize("sampler", ["uni_pc", "euler"])
@pytest.mark.parametrize("guidance", [None, 3.0])
def test_a_moa_acts_on_the_timesteps_it_was_trained_on_and_in_the_last_step(stirred_moa, sampler, guidance):
    limited = MoA(dataclasses.replace(stirred_moa.config, timesteps=500))
    limited.load_state_dict(stirred_moa.state_dict())
    seen: list[float] = []

    def drawn(moa, steps: int, strength: float = 1.0) -> torch.Tensor:
        seen.clear()
        options = QUICK | {"steps": steps, "sampler": sampler, "subject_cfg": guidance, "strength": strength}
        return pipeline(moa)(PROMPT, [person(1, "man")], watch=lambda call: seen.append(1), **options)[0]

    drawn(limited, 1)
    assert len(seen) == 1  # one step, at 999
    assert (drawn(limited, 5) - drawn(limited, 5, strength=0.0)).abs().max() > 1e-3
    drawn(limited, 5)
    assert len(seen) == 2  # 400 and 200, of 999, 799, 599
    assert (drawn(stirred_moa, 5) - drawn(limited, 5)).abs().max() > 1e-3 and len(seen) == 2


def test_without_a_subject_it_is_the_plain_base_model(stirred_moa):
    drawn, _ = pipeline(stirred_moa)(PROMPT, [person(1, "dog")], **QUICK)  # whose word is not there
    assert torch.equal(drawn, pipeline(stirred_moa)(PROMPT, [person(1, "man")], strength=0.0, **QUICK)[0])


def test_a_batch_paints_every_variant(stirred_moa):
    variants = torch.cat([person(seed, "man").features for seed in range(3)])
    pictures, trace = pipeline(stirred_moa)(PROMPT, [Subject(variants, "man", "")], batch=3, **QUICK)
    assert pictures.shape == (3, IMAGE_SIZE, IMAGE_SIZE, 3) and trace.subject_area().shape == (
        3,
        IMAGE_SIZE // 8,
        IMAGE_SIZE // 8,
    )
    again, _ = pipeline(stirred_moa)(PROMPT, [Subject(variants.flip(0), "man", "")], batch=3, **QUICK)
    torch.testing.assert_close(again[1], pictures[1])
    assert (again[0] - pictures[0]).abs().max() > 1e-3


def test_a_controlnet_acts_beside_moa(stirred_moa):
    """As diffusers has it: its residuals go into the U-Net, which the MoA then personalizes."""
    acting = pipeline(stirred_moa)
    network = ControlNetModel.from_unet(acting.base.unet)
    control = controlled_by(network, torch.rand(IMAGE_SIZE, IMAGE_SIZE, 3))

    def drawn(seed: int, **options):
        return acting(PROMPT, [person(seed, "man")], **QUICK, **options)[0]

    plain = drawn(1)
    assert torch.equal(drawn(1, control=control), plain)  # a fresh ControlNet changes nothing
    for part in (network.controlnet_down_blocks, network.controlnet_mid_block):
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    assert (drawn(1, control=control) - plain).abs().max() > 1e-2
    assert (drawn(1, control=control) - drawn(2, control=control)).abs().max() > 1e-3
