"""The MoA file: what is saved comes back, and nothing is left half-written."""

import dataclasses
import json

import pytest
import torch
from damaged_files import disk_full, header_size, metadata_of, refusal_by
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save, save_file

from moa_core.learned.moa import MoA
from moa_core.learned.moa_file import MoAFileError, load_moa, save_moa


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_file_comes_back_as_it_was(stirred_moa, tmp_path, dtype):
    path = tmp_path / "moa-toy.safetensors"
    save_moa(stirred_moa, path, dtype)
    back = load_moa(path, dtype=torch.float32)
    assert back.config == stirred_moa.config
    for name, weight in stirred_moa.state_dict().items():
        assert torch.equal(back.state_dict()[name], weight.to(dtype).float()), name
    pixels = torch.randn(3, 3, 64, 64)
    expected = stirred_moa.encode(pixels)
    tolerance = {torch.float32: 1e-5, torch.float16: 0.02, torch.bfloat16: 0.1}[dtype]
    assert (back.encode(pixels) - expected).abs().max() < tolerance * expected.abs().max()


def test_its_metadata_say_what_it_is(stirred_moa, tmp_path):
    save_moa(stirred_moa, tmp_path / "moa.safetensors")
    with safe_open(tmp_path / "moa.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["format_version"], metadata["base"]) == ("moa", "1", "MoA toy")
    assert json.loads(metadata["config"])["blocks"]["middle.0.0"] == [128, 64]


def test_it_says_up_to_which_timestep_it_was_trained_and_an_older_file_up_to_the_last(stirred_moa, tmp_path):
    path = tmp_path / "moa.safetensors"
    paper = MoA(dataclasses.replace(stirred_moa.config, timesteps=800))
    save_moa(paper, path)
    assert load_moa(path).config.timesteps == 800
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    for said, read in ((None, 1000), (0, None), (1001, None), (0.5, None), ("many", None)):
        config = json.loads(metadata["config"])
        del config["timesteps"]
        config |= {} if said is None else {"timesteps": said}
        weights = {name: weight.contiguous() for name, weight in paper.state_dict().items()}
        save_file(weights, path, metadata | {"config": json.dumps(config)})
        if read:
            assert load_moa(path).config.timesteps == read
        else:
            with pytest.raises(MoAFileError, match="damaged configuration"):
                load_moa(path)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(stirred_moa, tmp_path, monkeypatch):
    path = tmp_path / "moa.safetensors"
    save_moa(stirred_moa, path)
    before = path.read_bytes()
    monkeypatch.setattr("moa_core.learned.moa_file.save_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_moa(stirred_moa, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_whoever_may_read_other_new_files_may_read_it(stirred_moa, tmp_path):
    """A ComfyUI under another account, for example."""
    (tmp_path / "ordinary").touch()
    save_moa(stirred_moa, tmp_path / "moa.safetensors")
    assert (tmp_path / "moa.safetensors").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
    assert {path.name for path in tmp_path.iterdir()} == {"ordinary", "moa.safetensors"}


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(MoAFileError, match=r"gone\.safetensors' does not exist.*models/moa"):
        load_moa(tmp_path / "gone.safetensors")


NUMBER = st.integers(-3, 3) | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False)
ANYTHING = st.none() | st.booleans() | NUMBER | st.text(max_size=400) | st.lists(NUMBER, max_size=3)


@pytest.fixture(scope="module")
def whole(stirred_moa, tmp_path_factory) -> bytes:
    """An undamaged MoA file."""
    path = tmp_path_factory.mktemp("whole") / "moa.safetensors"
    save_moa(stirred_moa, path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def refusal(tmp_path_factory):
    """What a file of these bytes is refused with; None if it is loaded."""
    return refusal_by(load_moa, MoAFileError, tmp_path_factory.mktemp("damaged") / "moa-damaged.safetensors")


@given(st.data())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_a_file_cut_short_is_refused_in_one_sentence(whole, refusal, data):
    assert refusal(whole[: data.draw(st.integers(0, len(whole) - 1))])


@given(st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_file_with_other_bytes_in_its_header_is_loaded_or_refused_in_one_sentence(whole, refusal, data):
    content = bytearray(whole)
    for place in data.draw(st.lists(st.integers(0, header_size(whole) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    refusal(bytes(content))


@given(st.data())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_file_with_other_weights_is_refused_in_one_sentence(whole, refusal, data):
    weights = load(whole)
    for name in data.draw(st.lists(st.sampled_from(sorted(weights)), min_size=1, max_size=5, unique=True)):
        weight = weights.pop(name)
        change = data.draw(st.sampled_from(["drop", "rename", "reshape", "retype"]))
        if change == "rename":
            weights[data.draw(st.text(max_size=400)) + "'"] = weight
        elif change == "reshape":
            weights[name] = weight[None]
        elif change == "retype":
            kinds = [torch.int16, torch.bool, torch.float64, torch.complex64, torch.float8_e4m3fn]
            weights[name] = weight.to(data.draw(st.sampled_from(kinds)))
    assert refusal(save(weights, metadata_of(whole)))


def leaves(value, path=()):
    """Paths to all that is in a JSON object."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))


@given(st.data())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_a_file_with_another_configuration_is_loaded_or_refused_in_one_sentence(whole, refusal, data):
    metadata = metadata_of(whole)
    config = json.loads(metadata["config"])
    *parents, last = data.draw(st.sampled_from(list(leaves(config))))
    inside = config
    for key in parents:
        inside = inside[key]
    if data.draw(st.booleans()):
        inside[last] = data.draw(ANYTHING)
    else:
        inside[data.draw(st.text(max_size=400))] = inside.pop(last)
    refusal(save(load(whole), {**metadata, "config": json.dumps(config)}))


@given(st.sampled_from(["format", "format_version", "config"]), st.none() | st.text(max_size=1000))
@example("config", "[" * 100_000)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_a_file_with_other_metadata_is_refused_in_one_sentence(whole, refusal, key, value):
    metadata = {**metadata_of(whole), key: value}
    assert refusal(save(load(whole), {k: v for k, v in metadata.items() if v is not None}))


@pytest.mark.parametrize("value", [0, -1, "64", 10**12, 64.0, None, True, [64]])
def test_a_damaged_width_of_the_routers_names_the_routers(whole, refusal, value):
    metadata = metadata_of(whole)
    config = {**json.loads(metadata["config"]), "router_hidden": value}
    sentence = refusal(save(load(whole), {**metadata, "config": json.dumps(config)}))
    assert "router_hidden" in sentence or "router.choice" in sentence


def test_a_billion_layers_are_refused_before_they_are_built(whole, refusal):
    metadata = metadata_of(whole)
    config = json.loads(metadata["config"])
    config["image_encoder"]["num_hidden_layers"] = 10**9
    assert "num_hidden_layers is 1000000000" in refusal(save(load(whole), {**metadata, "config": json.dumps(config)}))
