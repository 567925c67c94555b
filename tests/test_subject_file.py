"""The subject file: what is saved comes back to the bit, and a damaged file is refused in one sentence."""

import pytest
import torch
from damaged_files import disk_full, metadata_of, refusal_by
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from moa_core.files.fingerprint import fingerprint
from moa_core.subjects.subject import EncoderId, Subject, interpolate
from moa_core.subjects.subject_file import SubjectFileError, load_subject, save_subject

ENCODER = EncoderId("0123abcd", "moa-toy.safetensors")


def person(seed: int, word: str = "man", **others) -> Subject:
    features, face = torch.randn(1, 64 + 512, generator=torch.Generator().manual_seed(seed)).split([64, 512], dim=1)
    return Subject(features, word, word, **{"encoder": ENCODER, "face": face, **others})


@pytest.fixture(scope="module")
def morph() -> Subject:
    """Everything that a subject can hold."""
    return interpolate(person(1, weight=0.3, area=torch.rand(2, 8, 6)), person(2, "Frau Müller"), 0.5, 5, "slerp")


def test_a_morph_with_its_weight_and_area_comes_back_to_the_bit(morph, tmp_path):
    save_subject(morph, tmp_path / "morph.safetensors")
    back = load_subject(tmp_path / "morph.safetensors")
    assert back.variants == 5 and torch.equal(back.features, morph.features) and torch.equal(back.area, morph.area)
    assert torch.equal(back.face, morph.face) and torch.allclose(back.face[0], person(1).face[0], atol=1e-6)
    assert (back.word, back.name, back.weight) == ("man", "man - Frau Müller", 0.3)
    assert back.encoder == ENCODER and back.encoder.moa == ENCODER.moa
    save_subject(person(1, face=None), tmp_path / "plain.safetensors")
    plain = load_subject(tmp_path / "plain.safetensors")
    assert plain.area is None and plain.face is None and interpolate(plain, person(2), 0.5).face is None


def test_subjects_of_two_encoders_do_not_blend(morph):
    other = person(3, encoder=EncoderId("4567", "moa-other.safetensors"))
    with pytest.raises(ValueError, match=r"moa-toy\.safetensors.*moa-other\.safetensors.*same MoA"):
        interpolate(person(1), other, 0.5)
    assert interpolate(person(1), person(2, encoder=EncoderId(ENCODER.fingerprint, "renamed")), 0.5).encoder == ENCODER


def test_what_nobody_could_read_again_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="Encode it with Subject Encoder"):
        save_subject(person(1, encoder=None), tmp_path / "unknown.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_file_and_nothing_else(morph, tmp_path, monkeypatch):
    path = tmp_path / "morph.safetensors"
    save_subject(morph, path)
    before = path.read_bytes()
    monkeypatch.setattr("moa_core.subjects.subject_file.save_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_subject(person(2), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_an_encoder_is_known_again_in_half_precision_and_told_from_any_other(stirred_moa):
    encoder, crop = stirred_moa.image_encoder, {"size": 64}
    own = fingerprint(crop, encoder)
    weights = {name: weight.half() for name, weight in encoder.state_dict().items()}
    halved = type(encoder)(stirred_moa.config.image_encoder).half()
    assert fingerprint(crop, halved) != own  # random weights of its own
    halved.load_state_dict(weights)
    assert fingerprint(crop, halved) == fingerprint(crop, halved.float()) == own
    assert fingerprint({"size": 65}, encoder) != own
    (changed,) = encoder.last_layers(1)[-1].parameters()
    before = changed.detach().clone()
    changed.data *= 1.01  # as little as a short training
    assert fingerprint(crop, encoder) != own
    changed.data.copy_(before)
    assert fingerprint(crop, encoder) == own


@pytest.fixture(scope="module")
def whole(morph, tmp_path_factory) -> bytes:
    """An undamaged subject file."""
    path = tmp_path_factory.mktemp("whole") / "subject.safetensors"
    save_subject(morph, path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def refusal(tmp_path_factory):
    """What a file of these bytes is refused with; None if it is loaded."""

    def read(path):
        subject = load_subject(path)
        assert subject.features.isfinite().all() and subject.variants and subject.weight >= 0

    return refusal_by(read, SubjectFileError, tmp_path_factory.mktemp("damaged") / "damaged_00001_.safetensors")


@given(st.data())
@settings(max_examples=40)
def test_a_file_cut_short_is_refused_in_one_sentence(whole, refusal, data):
    assert refusal(whole[: data.draw(st.integers(0, len(whole) - 1))])


@given(st.data())
@settings(max_examples=150)
def test_a_file_with_other_bytes_is_loaded_or_refused_in_one_sentence(whole, refusal, data):
    content = bytearray(whole)
    for place in data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    refusal(bytes(content))


@given(st.data())
@settings(max_examples=60)
def test_a_file_with_other_tensors_is_refused_in_one_sentence(whole, refusal, data):
    tensors = load(whole)
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors.pop(name)
    change = data.draw(st.sampled_from(["rename", "reshape", "retype", "empty", "nan"]))
    if change == "rename":
        tensors[data.draw(st.text(max_size=400)) + "'"] = tensor
    elif change == "reshape":
        tensors[name] = tensor[None]
    elif change == "retype":
        kinds = [torch.int16, torch.bool, torch.float64, torch.complex64, torch.float16]
        tensors[name] = tensor.to(data.draw(st.sampled_from(kinds)))
    elif change == "empty":
        tensors[name] = tensor[:0]
    else:
        tensors[name] = tensor * data.draw(st.sampled_from([float("nan"), float("inf")]))
    assert refusal(save(tensors, metadata_of(whole)))


@given(
    st.sampled_from(["format", "format_version", "weight", "word", "moa", "image_encoder"]),
    st.none() | st.text(max_size=1000),
)
@example("weight", "nan")
@example("weight", "-1")
@example("weight", "1e999")
@settings(max_examples=60)
def test_a_file_with_other_metadata_is_loaded_or_refused_in_one_sentence(whole, refusal, key, value):
    metadata = {**metadata_of(whole), key: value}
    sentence = refusal(save(load(whole), {k: v for k, v in metadata.items() if v is not None}))
    assert sentence or (key not in ("format", "format_version") and value is not None)


def test_other_files_are_told_by_their_kind(whole, refusal, tmp_path):
    moa = save({"mixture": torch.zeros(1)}, {"format": "moa", "format_version": "1"})
    assert "is no subject file: expected the format 'moa-subject' in its metadata, found 'moa'" in refusal(moa)
    later = save(load(whole), {**metadata_of(whole), "format_version": "2"})
    assert "has format version '2'" in refusal(later) and "update the pack" in refusal(later)
    for shape in ((5, 511), (4, 512)):
        other = save(load(whole) | {"face": torch.ones(shape)}, metadata_of(whole))
        assert f"damaged face: expected [5, 512], as its features have it, found {list(shape)}" in refusal(other)
    with pytest.raises(SubjectFileError, match=r"gone\.safetensors' does not exist.*models/moa_subjects"):
        load_subject(tmp_path / "gone.safetensors")
