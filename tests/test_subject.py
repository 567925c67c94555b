"""Interpolation of subjects, and the preparation of reference pictures."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moa_core.subjects.head_crop import CHIN, FOREHEAD, head_square
from moa_core.subjects.reference import prepare_reference, square_at
from moa_core.subjects.subject import Subject, interpolate


def subject(*values, word="man"):
    return Subject(torch.tensor([values], dtype=torch.float32), word, word)


@given(
    st.lists(st.floats(-5, 5), min_size=4, max_size=4),
    st.lists(st.floats(-5, 5), min_size=4, max_size=4),
    st.sampled_from(["linear", "slerp"]),
)
def test_the_ends_are_the_subjects_and_every_frame_is_finite(a, b, method):
    one, two = subject(*a), subject(*b, word="woman")
    assert torch.allclose(interpolate(one, two, 0.0, 1, method).features, one.features, atol=1e-4)
    assert torch.allclose(interpolate(one, two, 1.0, 1, method).features, two.features, atol=1e-4)
    morph = interpolate(one, two, 0.3, 7, method)
    assert morph.variants == 7 and morph.features.isfinite().all() and morph.word == "man"
    assert torch.allclose(morph.features[[0, -1]], torch.cat([one.features, two.features]), atol=1e-4)


def test_slerp_follows_the_arc_and_linear_the_chord():
    right, up = subject(2.0, 0.0), subject(0.0, 2.0)
    half = 2.0 * 0.5**0.5
    assert torch.allclose(interpolate(right, up, 0.5, 1, "slerp").features, torch.tensor([[half, half]]))
    assert torch.allclose(interpolate(right, up, 0.5, 1, "linear").features, torch.tensor([[1.0, 1.0]]))


def test_what_does_not_fit_is_refused():
    morph = interpolate(subject(1.0, 0.0), subject(0.0, 1.0), 0.5, 3)
    with pytest.raises(ValueError, match="3 and subject_b 1 variants already"):
        interpolate(morph, subject(0.0, 1.0), 0.5, 4)
    with pytest.raises(ValueError, match="expected linear or slerp"):
        interpolate(subject(1.0), subject(0.0), 0.5, 1, "cubic")
    assert interpolate(morph, subject(0.0, 1.0), 1.0).features.tolist() == [[0.0, 1.0]] * 3


def test_only_the_masked_person_counts():
    """Background and place in the picture make no difference; the person does."""
    person = torch.rand(40, 20, 3, generator=torch.Generator().manual_seed(0))
    prepared = []
    for top, left, shade in ((10, 10, 0.1), (30, 60, 0.9)):
        picture, mask = torch.full((100, 90, 3), shade), torch.zeros(100, 90)
        picture[top : top + 40, left : left + 20] = person
        mask[top : top + 40, left : left + 20] = 1.0
        prepared.append(prepare_reference(picture, mask, 32))
    assert prepared[0].shape == (3, 32, 32)
    assert torch.allclose(*prepared, atol=1e-5)
    assert not torch.allclose(prepare_reference(picture, None, 32), prepared[1], atol=0.1)


@given(st.integers(16, 90), st.integers(16, 90), st.integers(8, 48))
def test_pictures_keep_their_proportions(height, width, size):
    """A bar across the picture's full length is as long in the square; the padding is the neutral colour."""
    prepared = prepare_reference(torch.ones(height, width, 3), None, size)
    inside = (prepared[0] > 0.5 * prepared.max()).float()
    rows, columns = inside.amax(dim=1).sum(), inside.amax(dim=0).sum()
    assert max(rows, columns) == size
    assert abs(rows / columns - height / width) <= 2.5 * max(1, height / width) / min(rows, columns)


@given(st.integers(0, 3), st.integers(20, 60), st.integers(0, 1), st.integers(0, 100))
def test_the_square_round_a_head_holds_its_hair_and_turns_with_it(turns, length, at_edge, seed):
    """A face of 478 points is three quarters as wide as long; its head reaches 0.4 above it, and 0.1 to all sides."""
    random = torch.Generator().manual_seed(seed)
    angle = 2 * torch.pi * torch.rand(478, generator=random)
    angle[FOREHEAD], angle[CHIN] = 0.0, torch.pi
    points = length / 2 * torch.stack([0.75 * angle.sin(), -angle.cos()], dim=1)  # [478, 2], (x, y)
    middle = torch.tensor([0.5 * length, 0.9 * length]) if at_edge else torch.tensor([150.0, 120.0])
    head = torch.zeros(200, 300)
    across, above, below = round(0.45 * length), round(0.85 * length), round(0.55 * length)
    x, y = middle.round().int().tolist()
    head[y - above : y + below, x - across : x + across] = 1.0
    picture, points = torch.stack([head, torch.rand(200, 300, generator=random)], dim=-1), points + middle

    def cut(picture: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        return square_at(picture, *head_square(points, tuple(picture.shape[:2])), around=(0.0, 2.0))

    square = cut(picture, points)
    assert square.shape[0] == square.shape[1] < 2 * length
    assert square[..., 0].sum() == head.sum() and square[..., 1].max() < 2  # nothing beside the picture
    turned, size = torch.rot90(picture, turns), (300, 200)
    for turn in range(turns):  # counterclockwise: the right edge becomes the upper one
        points = torch.stack([points[:, 1], size[turn % 2] - points[:, 0]], dim=1)
    again = torch.rot90(cut(turned, points), -turns)
    assert again[..., 0].sum() == head.sum() and abs(len(again) - len(square)) <= 1
    assert (again[..., 0].sum(dim=0).cumsum(0)[len(again) // 2] - square[..., 0].sum(dim=0).cumsum(0)[len(square) // 2]
            ).abs() <= 2 * head.sum() / length  # fmt: skip


def test_a_face_as_large_as_the_picture_leaves_it_whole():
    """The square is no larger than the longer side; what the picture does not have is the neutral colour."""
    points = torch.rand(478, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([80.0, 120.0])
    points[FOREHEAD], points[CHIN] = torch.tensor([40.0, 0.0]), torch.tensor([40.0, 120.0])
    picture = torch.rand(130, 90, 3)
    square = square_at(picture, *head_square(points, (130, 90)))
    assert square.shape == (130, 130, 3) and torch.equal(square[:, 20:110], picture)
