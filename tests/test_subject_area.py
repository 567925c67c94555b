"""The subject area: what it is read off, when it cuts, and that calls may come in any form and order."""

import pytest
import torch

from moa_core.address import Address
from moa_core.routing.subject_area import SubjectArea, between_classes, mean_share, opening_end, two_classes
from moa_core.subjects.view import View

BLOCKS = [Address("input", n, 0) for n in range(1, 9)] + [Address("output", n, 0) for n in range(8)]
SIZE = (8, 12)
WHOLE = [View(0)]
LEVELS = [float(12 - n) for n in range(12)]
CUT_FROM = LEVELS[3]


def shares(*boxes: tuple[slice, slice], high: float = 0.8, low: float = 0.2) -> dict:
    """Layers of two sizes, soft, with a subject in a box in each row; those at both ends of the U-Net are open."""
    whole = torch.full((len(boxes), *SIZE), low)
    for row, box in enumerate(boxes):
        whole[(row, *box)] = high
    half = whole[:, ::2, ::2]
    routed = BLOCKS[2:-3]
    made = {}
    for number, block in enumerate(BLOCKS):
        share = half if number % 2 else whole
        made[block, "attn1"] = share if block in routed else torch.full_like(share, 0.9)
        made[block, "attn2"] = made[block, "attn1"]
    return made


LEFT, RIGHT = (slice(2, 6), slice(0, 4)), (slice(2, 6), slice(8, 12))
EVERYWHERE = (slice(None), slice(None))


def like(rows: int = 1, size: tuple[int, int] = SIZE) -> torch.Tensor:
    return torch.zeros(rows, 4, *size)


def area(run: SubjectArea, level: float, views=WHOLE, size=SIZE) -> torch.Tensor | None:
    """bool [B, h, w]: where latent-sized layers of a call may ask; None: everywhere."""
    rows = run.at(level, views, like(len(views), size))
    if rows is None or (pixels := rows.pixels(size)) is None:
        return None
    assert torch.equal(pixels.mask.sum(dim=1).max(), torch.tensor(float(pixels.index.shape[1])))
    return pixels.mask.unflatten(1, size).bool()


def run_steps(run: SubjectArea, levels, *boxes) -> None:
    for level in levels:
        run.at(level, WHOLE, like())
        run.add(shares(*boxes), {row: View(row) for row in range(len(boxes))}, like(len(boxes)))


def test_the_share_leaves_out_the_blocks_at_both_ends():
    blocks = [Address("input", n, 0) for n in range(7)]
    kinds = ("attn1", "attn2")
    layers = {(block, kind): torch.full((1, 2, 2), float(0 < block.block < 6)) for block in blocks for kind in kinds}
    layers[blocks[2], "attn1"] = torch.tensor([[[0.0, 0.4], [0.4, 0.4]]])
    layers[blocks[3], "attn2"] = torch.zeros(1, 1, 1)  # a layer of half the size
    expected = torch.tensor([[[8.0, 8.4], [8.4, 8.4]]]) / 10
    torch.testing.assert_close(mean_share(layers, (2, 2), blocks), expected)


def test_two_classes_are_parted_between_them_and_one_is_not_parted():
    values = torch.cat([torch.linspace(0.1, 0.3, 80), torch.linspace(0.6, 0.9, 20)])
    assert 0.3 < between_classes(values.numpy()) < 0.6
    assert two_classes(values).sum() == 20
    assert between_classes(torch.linspace(0.5, 0.52, 50).numpy()) is None
    assert two_classes(torch.full((4,), 0.9)).all() and not two_classes(torch.full((4,), 0.5)).any()


@pytest.mark.parametrize(("steps", "open_steps"), [(12, 3), (20, 5), (3, 1), (2, 1), (1, 1)])
def test_nothing_is_cut_in_the_first_quarter_of_the_timesteps(steps, open_steps):
    levels = [round(999 - 999 * n / steps) for n in range(steps)]
    run = SubjectArea(1, SIZE, opening_end(levels[0]), BLOCKS)
    cut = []
    for level in levels:
        cut.append(area(run, level) is not None)
        run.add(shares(LEFT), {0: View(0)}, like())
    assert cut == [n >= open_steps for n in range(steps)]


def test_the_area_is_where_the_subjects_are_and_layers_of_half_the_size_see_all_of_it():
    run = SubjectArea(1, SIZE, CUT_FROM, BLOCKS)
    odd = (slice(3, 6), slice(3, 6))
    run_steps(run, LEVELS[:3], odd)
    found = area(run, LEVELS[3])
    assert found[0][odd].all() and found.float().mean() < 0.3
    rows = run.at(LEVELS[3], WHOLE, like())
    pixels = rows.pixels((4, 6))
    small = pixels.mask.unflatten(1, (4, 6))[0]
    assert small[1:3, 1:3].all() and small.sum() <= 12


def test_an_area_moves_with_the_mean_of_the_steps():
    run = SubjectArea(1, SIZE, CUT_FROM, BLOCKS)
    run_steps(run, LEVELS[:3], LEFT)
    assert not area(run, LEVELS[3])[0][RIGHT].any()
    run_steps(run, LEVELS[3:9], RIGHT)  # what the routers want counts, though nobody is asked there
    assert area(run, LEVELS[9])[0][RIGHT].all()


def test_pictures_have_areas_of_their_own_and_the_rows_of_the_negative_their_pictures():
    run = SubjectArea(2, SIZE, CUT_FROM, BLOCKS)
    run_steps(run, LEVELS[:3], LEFT, RIGHT)
    views = [View(1), View(0), View(0), View(1)]
    found = area(run, LEVELS[3], views)
    assert torch.equal(found[0], found[3]) and torch.equal(found[1], found[2])
    assert found[1][LEFT].all() and not found[1][RIGHT].any()
    assert found[0][RIGHT].all() and not found[0][LEFT].any()


def test_calls_of_one_level_see_the_same_area_however_they_are_split():
    together, apart = SubjectArea(2, SIZE, CUT_FROM, BLOCKS), SubjectArea(2, SIZE, CUT_FROM, BLOCKS)
    for level in LEVELS[:5]:
        together.at(level, WHOLE, like())
        together.add(shares(LEFT, RIGHT), {0: View(0), 1: View(1)}, like(2))
        together.add(shares(RIGHT, RIGHT), {0: View(0), 1: View(1)}, like(2))  # a sampler's second call
        before = area(apart, level)
        for box, picture in ((RIGHT, 1), (LEFT, 0), (RIGHT, 0), (RIGHT, 1)):
            apart.add(shares(box), {0: View(picture)}, like())
            now = area(apart, level)
            assert (now is None and before is None) or torch.equal(now, before)
    both = [View(0), View(1)]
    assert torch.equal(area(together, LEVELS[5], both), area(apart, LEVELS[5], both))


def test_a_prompt_for_a_part_of_the_picture_marks_and_sees_that_part_and_what_none_has_shown_stays_open():
    run = SubjectArea(1, SIZE, CUT_FROM, BLOCKS)
    half = View(0, (0, 6, 8, 6))  # the right half
    for level in LEVELS[:3]:
        run.at(level, WHOLE, like())
        cropped = {k: v[..., v.shape[2] // 2 :].clone() for k, v in shares(EVERYWHERE).items()}
        for (block, _), share in cropped.items():
            if block in BLOCKS[2:-3]:
                share[..., : share.shape[2] // 2] = 0.1  # the subject: the right quarter
        run.add(cropped, {0: half}, like(1, (8, 6)))
    whole = area(run, LEVELS[3])[0]
    assert whole[:, :6].all() and not whole[:, 6:8].any() and whole[:, 10:].all()
    assert torch.equal(area(run, LEVELS[3], [half], (8, 6))[0], whole[:, 6:])
    # A cut that no view describes is not guessed at.
    assert run.at(LEVELS[3], WHOLE, like(1, (4, 12))) is None and run.at(LEVELS[3], [View(7)], like()) is None


def test_where_routers_tell_nothing_apart_nothing_is_cut():
    """A fresh MoA's are neutral everywhere; a U-Net that others skip has none to ask."""
    run = SubjectArea(1, SIZE, CUT_FROM, BLOCKS)
    run_steps(run, LEVELS[:6], EVERYWHERE)
    assert area(run, LEVELS[6]) is None
    empty = SubjectArea(1, SIZE, CUT_FROM, BLOCKS)
    for level in LEVELS:
        assert empty.at(level, WHOLE, like()) is None
        empty.add({}, {0: View(0)}, like())


def test_it_does_not_grow_with_the_steps():
    def held(thing) -> int:
        """Numbers in all tensors that hang on it."""
        if isinstance(thing, torch.Tensor):
            return thing.numel()
        if isinstance(thing, dict):
            return sum(map(held, thing.values()))
        return held(vars(thing)) if hasattr(thing, "__dict__") else 0

    levels = [float(200 - n) for n in range(200)]
    run = SubjectArea(1, SIZE, 150.0, BLOCKS)
    sizes = []
    for level in levels:
        run.at(level, WHOLE, like())
        run.add(shares(LEFT), {0: View(0)}, like())
        sizes.append(held(run))
    assert sizes[60] > 0 and sizes[-1] == sizes[60]
