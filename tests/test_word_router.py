"""The word router: whose pixel a pixel is, read off the prior's attention to words, or given by an area."""

import copy
import gc
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sdxl import sdxl_unet
from test_moa_layer import HostReads

from moa_core.adapters.image_expert import ImageMixture, file_order
from moa_core.adapters.run import ImageRun
from moa_core.address import block_shapes
from moa_core.learned.run import LearnedRun
from moa_core.routing.word_router import WordReader, WordRouter, read_blocks
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
            router.add(subject, view, attention)
    return shares


def test_each_person_gets_the_pixels_that_attend_to_their_word_and_the_background_gets_nobody():
    man, woman = person("man"), person("woman")
    router = WordRouter([man, woman], 1, SIZE, LEVELS)
    shares = steps(router, LEVELS, bump(2), bump(9, height=20.0))[:, 0]  # one word draws more attention than the other
    assert (shares[0, :, 3:7] > 0.5).all() and not shares[0, :, 14:].any()
    assert (shares[1, :, 17:21] > 0.5).all() and not shares[1, :, :9].any()
    assert shares.sum(dim=0)[:, 11:13].max() < 0.3 and shares.max() <= 1.0


def test_all_of_a_person_has_a_full_share_and_not_the_brightest_spot_alone():
    """A head that draws three times the attention of its body; between them and the rest lies nothing."""
    attention = torch.full((8, 12), 0.1)
    attention[2:8, 3:6], attention[1:3, 3:6] = 1.0, 3.0
    shares = steps(WordRouter([person("man")], 1, SIZE, LEVELS), LEVELS, attention)[0, 0]
    assert (shares[3:5, 7:11] == 1.0).all() and shares[8:15, 7:11].min() > 0.4 and not shares[:, 14:].any()


def test_the_beginning_is_the_priors_and_later_steps_see_only_finished_ones():
    levels = [float(20 - n) for n in range(20)]
    router = WordRouter([person("man")], 1, SIZE, levels)
    seen = []
    for level in levels:
        before = router.at(level).clone()
        router.add(router.subjects[0], View(0), bump(2))
        assert torch.equal(router.at(level), before)  # calls of one level see the same
        seen.append(bool(before.any()))
    assert seen == [False] * 3 + [True] * 17
    assert not steps(WordRouter([person("man")], 1, SIZE, LEVELS), LEVELS, torch.ones(8, 12)).any()  # nothing to see


def test_what_a_part_of_the_picture_shows_counts_there_alone():
    whole, parts = (WordRouter([person("man"), person("woman")], 2, SIZE, LEVELS) for _ in range(2))
    steps(whole, LEVELS[:3], bump(2), bump(9), view=View(1))
    for level in LEVELS[:3]:
        parts.at(level)
        parts.add(parts.subjects[0], View(1, (0, 0, 16, 12)), bump(2)[:, :6])
        parts.add(parts.subjects[1], View(1, (0, 12, 16, 12)), bump(9)[:, 6:])
    one, other = whole.at(LEVELS[3]), parts.at(LEVELS[3])
    assert not one[:, 0].any() and not other[:, 0].any()
    assert ((one[:, 1] > 0) == (other[:, 1] > 0)).float().mean() > 0.9
    assert not other[0, 1, :, 12:].any() and not other[1, 1, :, :12].any()


def test_an_area_overrides_the_maps_from_the_first_step_on():
    man, other = person("man", sides(1)), person("man")
    router = WordRouter([man, other], 1, SIZE, LEVELS)
    shares = router.at(LEVELS[0])[:, 0]
    assert not router.reads(man) and torch.equal(shares[0], man.area_in(0, SIZE)) and not shares[1].any()
    for level in LEVELS[:3]:
        router.at(level)
        router.add(other, View(0), bump(9) + bump(2))
    shares = router.at(LEVELS[3])[:, 0]
    assert torch.equal(shares[0], man.area_in(0, SIZE)) and not shares[1, :, 12:].any() and shares[1, :, 4].all()


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


class Reading:
    """A U-Net call that leaves all to the prior and reads its words."""

    def __init__(self, words: WordReader):
        self.words = words

    def mix(self, address, attention, h, prior, size):
        if attention == "attn2":
            self.words.read(address, h, size)
        return prior


@torch.no_grad()
def test_in_pictures_of_two_people_the_words_find_them_and_tell_who_is_who():
    """The toy world's own base model looks at noisy pictures whose people are known."""
    base = load_toy(TOY_BASE)
    blocks, wrapped = block_shapes(base.unet.state_dict()), MoAUNet(base.unet, torch.nn.Module())
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
        router, rows = WordRouter(people, 1, (side, side), levels.tolist()), [Row(View(0), bindings, 77, True)]
        random = torch.Generator().manual_seed(seed)
        for level in levels:
            router.begin(float(level))
            noisy = add_noise(latents, torch.randn(latents.shape, generator=random), level[None])
            words = WordReader(router, read_blocks(blocks), rows, context, prior_of(base.unet))
            wrapped.run(noisy, level[None].float(), context, Reading(words))
            words.note(noisy)
        router.finish()
        shares = router.last()[:, 0]
        area = shares.sum(dim=0)
        found.append((area[anyone][:, None] > area[~anyone]).float().mean().item())  # the area under the curve
        right.append((shares.argmax(dim=0) == who)[anyone].float().mean().item())
    print(f"{len(found)} pairs: AUC {np.mean(found):.2f}, right person {np.mean(right):.2f}")
    assert len(found) == 8 and np.mean(found) > 0.8 and np.mean(right) > 0.85


@pytest.fixture
def image_run(toy_base):
    """A run of one picture in which a man and a woman are bound, routed by the prior of the toy U-Net."""
    blocks = block_shapes(toy_base.unet.state_dict())
    torch.manual_seed(0)
    mixture = ImageMixture([blocks[a] for a in file_order(blocks)], 4)
    people = [person(word, width=mixture.feature_dim) for word in ("man", "woman")]
    rows = [
        Row(View(0), tuple(Binding(place, p) for place, p in zip((3, 8), people, strict=True)), 77, True),
        Row(View(0), (), 77, False),
    ]
    return ImageRun(mixture, people, 1, (16, 16), LEVELS, 1.0, blocks, True), rows, copy.deepcopy(toy_base.unet)


@torch.no_grad()
def test_a_negative_row_has_its_pixels_where_the_positive_rows_people_are(image_run):
    run, rows, unet = image_run
    wrapped = MoAUNet(unet, run.mixture)
    latents, context = torch.randn(2, 4, 16, 16), torch.randn(2, 77, DIM)
    for level in LEVELS[:4]:
        timestep = torch.tensor([level, level])
        call = run.call(rows, level, latents, context, timestep, prior_of(unet))
        wrapped.run(latents, timestep, context, call)
        run.finish(call, rows, latents)
    share = next(iter(call.shares.values()))
    assert share[0].any() and torch.equal(share[0], share[1]) and 0 < call.asked < call.pixels
    assert all(attention == "attn2" for _, attention in call.shares)


@torch.no_grad()
def test_rows_of_two_pictures_come_out_the_same_in_any_order_and_in_any_calls(image_run):
    one, (positive, negative), unet = image_run
    people = [replace(s, features=torch.randn(2, one.mixture.feature_dim)) for s in one.router.subjects]
    bindings = tuple(Binding(b.position, p) for b, p in zip(positive.bindings, people, strict=True))
    rows = [
        replace(row, view=View(n), bindings=bindings if row.positive else ())
        for n in range(2)
        for row in (negative, positive)
    ]
    latents, context = torch.randn(4, 4, 16, 16), torch.randn(4, 77, DIM)
    drawn = []
    for calls in ([[0, 1, 2, 3]], [[3, 2], [1], [0]], [[2, 0, 1], [3]]):
        run = ImageRun(one.mixture, people, 2, (16, 16), LEVELS, 1.0, block_shapes(unet.state_dict()), True)
        wrapped, out = MoAUNet(copy.deepcopy(unet), run.mixture), torch.zeros_like(latents)
        for level in LEVELS[:4]:
            for which in calls:
                shown, text, timestep = latents[which], context[which], torch.full((len(which),), level)
                chosen = [rows[n] for n in which]
                call = run.call(chosen, level, shown, text, timestep, prior_of(wrapped.unet))
                out[which] = wrapped.run(shown, timestep, text, call)
                run.finish(call, chosen, shown)
        drawn.append(out)
    assert call.asked and (drawn[0][1] - drawn[0][3]).abs().max() > 0.1
    torch.testing.assert_close(drawn[1], drawn[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(drawn[2], drawn[0], atol=1e-4, rtol=0)


@torch.no_grad()
def test_no_image_expert_makes_the_host_wait_for_an_accelerator(image_run):
    run, rows, unet = image_run
    prior, latents, context = prior_of(unet), torch.randn(2, 4, 16, 16), torch.randn(2, 77, DIM)
    h = {address: torch.randn(2, 64, expert.dim) for address, expert in run.layers.items()}
    for level in LEVELS[:4]:
        call = run.call(rows, level, latents, context, torch.tensor([level, level]), prior)
        call.people.at((8, 8))  # sizes are worked out on the CPU, once a level
        with HostReads() as waits:
            for address in run.layers:
                call.mix(address, "attn2", h[address], h[address], (8, 8))
            run.finish(call, rows, latents)
        assert waits.count == 0
    assert call.asked


@torch.no_grad()
def test_a_photo_goes_through_every_expert_once_whatever_the_steps_and_tiles(image_run):
    run, rows, unet = image_run
    wrapped, latents, context = MoAUNet(unet, run.mixture), torch.randn(2, 4, 16, 16), torch.randn(2, 77, DIM)
    seen = []
    for expert in run.layers.values():
        expert.to_v.register_forward_hook(lambda module, *_: seen.append(module))
    for level in LEVELS[:5]:
        timestep = torch.tensor([level, level])
        for top in (0, 8):
            tiles = [replace(row, view=View(0, (top, 0, 8, 16))) for row in rows]
            call = run.call(tiles, level, latents[:, :, top : top + 8], context, timestep, prior_of(unet))
            wrapped.run(latents[:, :, top : top + 8], timestep, context, call)
            run.finish(call, tiles, latents[:, :, top : top + 8])
    assert call.asked and len(seen) == len(set(seen)) == len(run.layers)


@torch.no_grad()
def test_a_film_in_ever_new_windows_keeps_few_tokens(image_run):
    one, (row, _), unet = image_run
    blocks = block_shapes(unet.state_dict())
    run = ImageRun(one.mixture, one.router.subjects, 100, (16, 16), LEVELS, 1.0, blocks, True)
    prior, latents, context = prior_of(unet), torch.randn(2, 4, 16, 16), torch.randn(2, 77, DIM)
    kept = []
    for picture in range(99):
        window = [replace(row, view=View(n)) for n in (picture, picture + 1)]
        kept.append(weakref.ref(run.call(window, 1.0, latents, context, torch.ones(2), prior).tokens))
    gc.collect()
    assert 0 < sum(tokens() is not None for tokens in kept) < 30


def learned(stirred_moa, subjects, rows: int = 1) -> tuple:
    """A call of the learned kind in which each subject is bound, and what its first cross-attention makes."""
    mixture = stirred_moa.mixture
    address, shape = next(iter(mixture.config.blocks.items()))
    random = torch.Generator().manual_seed(0)
    context = torch.randn(rows, 77, DIM, generator=random)
    h, prior = (torch.randn(rows, 256, shape.dim, generator=random) for _ in range(2))
    bound = tuple(Binding(3 + 5 * number, subject) for number, subject in enumerate(subjects))
    run = LearnedRun(mixture, subjects, 1, (16, 16), LEVELS, 1.0, mixture.config.blocks, False)
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
