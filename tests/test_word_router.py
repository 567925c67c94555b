"""The word router: whose pixel a pixel is, read off the prior's attention to words, or given by an area."""

import copy
import gc
import weakref
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_runs import image_run
from sdxl import sdxl_unet
from test_moa_layer import HostReads

from moa_core.adapters.image_expert import ImageMixture, file_order
from moa_core.address import block_shapes
from moa_core.attention import attend
from moa_core.learned.run import LearnedRun
from moa_core.routing.word_router import GROWTH, WordRouter, read_blocks
from moa_core.run import Run
from moa_core.subjects.binding import Binding
from moa_core.subjects.rows import Row
from moa_core.subjects.subject import Subject
from moa_core.subjects.view import View
from toy_world.draw import draw_scene
from toy_world.shape import IMAGE_SIZE, TEXT_ENCODER
from toy_world.world import sample_scene
from training.host import sd15
from training.host.adapter import MoAUNet
from training.host.prior import prior_of
from training.host.schedule import add_noise
from training.host.tokenizer import bind_prompt, tokenize
from training.host.toy_base import load_toy

TOY_BASE = Path(__file__).parent.parent / "models/checkpoints/moa-toy-base.safetensors"
SIZE = (16, 24)
LEVELS = [float(10 - n) for n in range(10)]
DIM = TEXT_ENCODER["hidden_size"]


def person(word: str, area: torch.Tensor | None = None, weight: float = 1.0, width: int = 4) -> Subject:
    random = torch.Generator().manual_seed(len(word))
    return Subject(torch.randn(1, width, generator=random), word, word, weight, area)


def bump(column: int, height: float = 1.0) -> torch.Tensor:
    """Attention [8, 12] to a word, most of it round that column of 12."""
    distance = (torch.arange(12.0) - column).expand(8, -1)
    return 0.01 + height * torch.exp(-0.5 * (distance / 1.5) ** 2)


def sides(column: int) -> torch.Tensor:
    """An area of the left or right half of a picture of any size."""
    area = torch.zeros(1, 32, 48)
    area[..., :24] = float(column == 0)
    area[..., 24:] = float(column == 1)
    return area


def steps(router: WordRouter, levels, *maps: torch.Tensor, view: View = View(0)) -> torch.Tensor:  # noqa: B008
    for level in levels:
        shares = router.at(level)
        for subject, attention in zip(router.subjects, maps, strict=True):
            router.add(subject, view, attention[None])
    return shares


def test_each_person_gets_the_pixels_that_attend_to_their_word_and_the_background_gets_nobody():
    man, woman = person("man"), person("woman")
    router = WordRouter([man, woman], 1, SIZE)
    steps(router, LEVELS, bump(2), bump(9, height=20.0))  # one word draws more attention than the other
    shares = router.last()[:, 0]
    assert (shares[0, :, 3:7] == 1).all() and not shares[0, :, 14:].any()
    assert (shares[1, :, 17:21] == 1).all() and not shares[1, :, :9].any()
    assert set(shares.unique().tolist()) == {0.0, 1.0} and shares.sum(dim=0).max() == 1


def test_all_of_a_person_has_a_full_share_and_not_the_brightest_spot_alone():
    """A head that draws three times the attention of its body; between them and the rest lies nothing."""
    attention = torch.full((8, 12), 0.1)
    attention[2:8, 3:6], attention[1:3, 3:6] = 1.0, 3.0
    router = WordRouter([person("man")], 1, SIZE)
    steps(router, LEVELS, attention)
    shares = router.last()[0, 0]
    assert (shares[2:16, 6:12] == 1.0).all() and not shares[:, 15:].any()


def test_people_reach_beyond_what_the_words_cover_but_not_into_each_other():
    """Hair and outline lie outside of the prior's person: growth takes what is nobody's."""
    attention = torch.zeros(2, 12, 12)
    attention[0, 4:8, 2:6], attention[1, 4:8, 6:10] = 1.0, 1.0
    router = WordRouter([person("man"), person("woman")], 1, (12, 12))
    steps(router, LEVELS, *attention)
    man, woman = router.last()[:, 0]
    reach = round(GROWTH * 12)
    assert (man[4 - reach : 8 + reach, 2 - reach : 6] == 1).all() and not man[:, 6:].any()
    assert (woman[4 - reach : 8 + reach, 6 : 10 + reach] == 1).all() and not woman[:, :6].any()
    assert not (man + woman)[: 4 - reach - 1].any()


def test_later_steps_see_only_finished_ones_and_the_first_what_was_scouted():
    router = WordRouter([person("man")], 1, SIZE)
    seen = []
    for level in LEVELS:
        before = router.at(level).clone()
        router.add(router.subjects[0], View(0), bump(2)[None])
        assert torch.equal(router.at(level), before)  # calls of one level see the same
        seen.append(bool(before.any()))
    assert seen == [False] + [True] * 9
    router.finish()
    later = WordRouter(router.subjects, 1, SIZE)
    assert later.is_blind
    later.goes_on_from([(router.steps, 0)])
    assert not later.is_blind and torch.equal(later.at(LEVELS[0]), router.last())
    nothing = WordRouter([person("man")], 1, SIZE)
    assert not steps(nothing, LEVELS, torch.ones(8, 12)).any()  # nothing to see


def test_what_a_part_of_the_picture_shows_counts_there_alone():
    whole, parts = (WordRouter([person("man"), person("woman")], 2, SIZE) for _ in range(2))
    steps(whole, LEVELS[:3], bump(2), bump(9), view=View(1))
    for level in LEVELS[:3]:
        parts.at(level)
        parts.add(parts.subjects[0], View(1, (0, 0, 16, 12)), bump(2)[None, :, :6])
        parts.add(parts.subjects[1], View(1, (0, 12, 16, 12)), bump(9)[None, :, 6:])
    one, other = whole.at(LEVELS[3]), parts.at(LEVELS[3])
    assert not one[:, 0].any() and not other[:, 0].any()
    assert ((one[:, 1] > 0) == (other[:, 1] > 0)).float().mean() > 0.9


def test_an_area_overrides_the_maps_from_the_first_step_on():
    man, other = person("man", sides(1)), person("man")
    router = WordRouter([man, other], 1, SIZE)
    shares = router.at(LEVELS[0])[:, 0]
    assert not router.reads(man) and torch.equal(shares[0], man.area_in(0, SIZE)) and not shares[1].any()
    for level in LEVELS[:3]:
        router.at(level)
        router.add(other, View(0), (bump(9) + bump(2))[None])
    shares = router.at(LEVELS[3])[:, 0]
    assert torch.equal(shares[0], man.area_in(0, SIZE)) and not shares[1, :, 24:].any() and shares[1, :, 4].all()
    assert not WordRouter([man], 1, SIZE).is_blind


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (sd15.unet, ["output.3.0", "output.4.0", "output.5.0"]),
        (sdxl_unet, [f"{block}.{index}" for block in ("middle.0", "output.1") for index in range(10)]),
    ],
)
def test_the_blocks_read_are_a_quarter_of_the_latents_size(make, expected):
    with torch.device("meta"):
        unet = make()
    assert [str(address) for address in read_blocks(block_shapes(unet.state_dict()))] == expected


@torch.no_grad()
def test_in_pictures_of_two_people_the_words_find_them_and_tell_who_is_who():
    """The toy world's own base model looks at noisy pictures whose people are known."""
    base = load_toy(TOY_BASE)
    blocks, wrapped = block_shapes(base.unet.state_dict()), MoAUNet(base.unet, None)
    found, right, side = [], [], IMAGE_SIZE // 8
    for seed in range(60):
        scene = sample_scene(np.random.default_rng([5, seed]), held_out=True)
        people = [person(who.word) for who in scene.people]
        bindings = bind_prompt(scene.caption, people).bindings
        if len(people) != 2 or len(bindings) < 2 or len(found) == 8:
            continue
        image, segments = draw_scene(scene)
        masks = torch.stack([torch.from_numpy(segments == number).float()[None] for number in (1, 2)])
        masks = torch.nn.functional.adaptive_avg_pool2d(masks, side)[:, 0]  # [2, h, w]
        anyone, who = masks.sum(dim=0) > 0.5, masks.argmax(dim=0)
        pixels = torch.from_numpy(np.array(image)).float().movedim(-1, 0)[None] / 127.5 - 1
        latents = base.autoencoder.encode(pixels, torch.zeros(1, 4, side, side))
        context = base.text_encoder(torch.tensor([tokenize(scene.caption)])).last_hidden_state
        levels = torch.arange(950, 0, -150)
        rows, random = [Row(View(0), bindings, 77, True)], torch.Generator().manual_seed(seed)
        run = Run(people, 1, (side, side), 0.0, blocks)
        for level in levels:
            noisy = add_noise(latents, torch.randn(latents.shape, generator=random), level[None])
            call = run.call(rows, float(level), noisy, context, level[None].float(), prior_of(base.unet))
            wrapped.run(noisy, level[None].float(), context, call)
            run.finish(call, rows, noisy)
        run.router.finish()
        shares = run.router.last()[:, 0]
        area = shares.sum(dim=0)
        found.append([area[where].mean().item() for where in (anyone, ~anyone)])
        right.append((shares.argmax(dim=0) == who)[anyone].float().mean().item())
    people, background = np.mean(found, axis=0)
    print(f"{len(found)} pairs: of people {people:.2f}, of background {background:.2f}; whose {np.mean(right):.2f}")
    assert len(found) == 8 and people > 0.9 and background < 0.6 and np.mean(right) > 0.9


@dataclass
class One:
    """The image experts of one picture's man and woman, their rows, and the toy U-Net."""

    mixture: ImageMixture
    people: list
    rows: list
    unet: MoAUNet
    blocks: dict

    def run(self, people=None, pictures: int = 1) -> Run:
        return image_run(self.mixture, people or self.people, self.blocks, pictures=pictures)

    def call(self, run, rows, level, latents, context):
        """One U-Net call, and what it makes."""
        timestep = torch.full((len(rows),), level)
        call = run.call(rows, level, latents, context, timestep, prior_of(self.unet.unet))
        out = self.unet.run(latents, timestep, context, call)
        run.finish(call, rows, latents)
        return call, out


@pytest.fixture
def one(toy_base) -> One:
    unet = copy.deepcopy(toy_base.unet)
    blocks = block_shapes(unet.state_dict())
    torch.manual_seed(0)
    mixture = ImageMixture([blocks[a] for a in file_order(blocks)], 4)
    people = [person(word, width=mixture.feature_dim) for word in ("man", "woman")]
    rows = [
        Row(View(0), tuple(Binding(place, p) for place, p in zip((3, 8), people, strict=True)), 77, True),
        Row(View(0), (), 77, False),
    ]
    return One(mixture, people, rows, MoAUNet(unet, None), blocks)


@torch.no_grad()
def test_a_negative_row_has_its_pixels_where_the_positive_rows_people_are(one):
    run, latents, context = one.run(), torch.randn(2, 4, 16, 16), torch.randn(2, 77, DIM)
    for level in LEVELS[:4]:
        call, _ = one.call(run, one.rows, level, latents, context)
    share = next(iter(call.shares.values()))
    assert share[0].any() and torch.equal(share[0], share[1])
    assert all(attention == "attn2" for _, attention in call.shares)


@torch.no_grad()
def test_rows_of_two_pictures_come_out_the_same_in_any_order_and_in_any_calls(one):
    positive, negative = one.rows
    people = [replace(s, features=torch.randn(2, one.mixture.feature_dim)) for s in one.people]
    bindings = tuple(Binding(b.position, p) for b, p in zip(positive.bindings, people, strict=True))
    rows = [
        replace(row, view=View(n), bindings=bindings if row.positive else ())
        for n in range(2)
        for row in (negative, positive)
    ]
    latents, context = torch.randn(4, 4, 16, 16), torch.randn(4, 77, DIM)
    drawn = []
    for calls in ([[0, 1, 2, 3]], [[3, 2], [1], [0]], [[2, 0, 1], [3]]):
        run, out = one.run(people, pictures=2), torch.zeros_like(latents)
        for level in LEVELS[:4]:
            for which in calls:
                call, out[which] = one.call(run, [rows[n] for n in which], level, latents[which], context[which])
        drawn.append(out)
    assert call.adapters.where.anyone and (drawn[0][1] - drawn[0][3]).abs().max() > 0.1
    torch.testing.assert_close(drawn[1], drawn[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(drawn[2], drawn[0], atol=1e-4, rtol=0)


@torch.no_grad()
def test_no_image_expert_makes_the_host_wait_for_an_accelerator(one):
    run, latents, context = one.run(), torch.randn(2, 4, 16, 16), torch.randn(2, 77, DIM)
    prior = prior_of(one.unet.unet)
    q = {address: torch.randn(2, 64, shape.dim) for address, shape in one.blocks.items()}
    for level in LEVELS[:4]:
        call = run.call(one.rows, level, latents, context, torch.tensor([level, level]), prior)
        for ask in call.adapters.asks:
            call.adapters.where.at((8, 8)).of(ask)  # sizes are worked out on the CPU, once a level
        with HostReads() as waits:
            for address, queries in q.items():
                call.attended(address, queries, prior(address).to_k(context), queries, (8, 8), attend)
            run.finish(call, one.rows, latents)
        assert waits.count == 0
    assert call.adapters.asks


@torch.no_grad()
def test_a_photo_goes_through_every_expert_once_a_tile_whatever_the_steps(one):
    run, latents, context = one.run(), torch.randn(2, 4, 16, 16), torch.randn(2, 77, DIM)
    seen = []
    for expert in one.mixture.layers:
        expert.to_v.register_forward_hook(lambda module, *_: seen.append(module))
    for level in LEVELS[:5]:
        for top in (0, 8):
            tiles = [replace(row, view=View(0, (top, 0, 8, 16))) for row in one.rows]
            one.call(run, tiles, level, latents[:, :, top : top + 8], context)
    assert len(seen) == 2 * len(set(seen)) == 2 * len(one.mixture.layers)


@torch.no_grad()
def test_a_film_in_ever_new_windows_keeps_few_tokens(one):
    run, prior = one.run(pictures=100), prior_of(one.unet.unet)
    latents, context = torch.randn(2, 4, 16, 16), torch.randn(2, 77, DIM)
    whole = [replace(one.rows[0], view=View(n)) for n in (0, 1)]
    one.call(run, whole, 2.0, latents, context)
    kept = []
    for picture in range(99):
        window = [replace(one.rows[0], view=View(n)) for n in (picture, picture + 1)]
        call = run.call(window, 1.0, latents, context, torch.ones(2), prior)
        kept += [weakref.ref(content) for content in run.adapters._content.values()]
    del call
    gc.collect()
    assert 0 < len({id(content()) for content in kept if content() is not None}) < 30


def learned(stirred_moa, subjects, rows: int = 1) -> tuple:
    """A call of the learned kind in which each subject is bound, and what its first cross-attention makes."""
    mixture = stirred_moa.mixture
    address, shape = next(iter(mixture.config.blocks.items()))
    random = torch.Generator().manual_seed(0)
    context = torch.randn(rows, 77, DIM, generator=random)
    h, prior = (torch.randn(rows, 256, shape.dim, generator=random) for _ in range(2))
    bound = tuple(Binding(3 + 5 * number, subject) for number, subject in enumerate(subjects))
    run = LearnedRun(mixture, 1, (16, 16), 0.0, 1.0, False)
    call = run.call(
        [Row(View(0), bound, 77, True)] * rows, 5.0, torch.zeros(rows, 4, 16, 16), context, torch.ones(rows)
    )
    return call, call.mix(address, "attn2", h, prior, (16, 16)).unflatten(1, (16, 16)), address, context


@torch.no_grad()
def test_a_learned_subjects_weight_leads_from_the_plain_word_to_the_subject_and_beyond(stirred_moa):
    prompts = {}
    for weight in (0.0, 0.5, 1.0, 2.0):
        call, _, address, context = learned(stirred_moa, [person("man", weight=weight, width=64)])
        prompts[weight] = call.subject_prompt(address)
    torch.testing.assert_close(prompts[0.0], context)
    for weight in (0.5, 2.0):
        torch.testing.assert_close(prompts[weight], torch.lerp(context, prompts[1.0], weight))
    assert (prompts[1.0] - context).abs().max() > 1e-2


@torch.no_grad()
def test_a_learned_subject_is_seen_in_its_area_and_is_the_plain_word_elsewhere(stirred_moa):
    def mixed(*subjects):
        return learned(stirred_moa, subjects, rows=2)[1]

    man, woman = person("man", width=64), person("woman", width=64)
    left, right = (person(p.word, sides(n), width=64) for n, p in enumerate((man, woman)))
    nobody, nowhere = person("man", weight=0.0, width=64), person("woman", weight=0.0, width=64)
    both = mixed(left, right)
    torch.testing.assert_close(both[:, :, :8], mixed(man, nowhere)[:, :, :8])
    torch.testing.assert_close(both[:, :, 8:], mixed(nobody, woman)[:, :, 8:])
    torch.testing.assert_close(mixed(person("man", torch.ones(1, 8, 8), width=64), woman), mixed(man, woman))
    assert (both - mixed(man, woman)).abs().max() > 1e-3
