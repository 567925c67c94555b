"""The MoA file: what is saved comes back, and nothing is left half-written."""

import json

import pytest
import torch
from safetensors import safe_open

from moa_core.moa_file import MoAFileError, load_moa, save_moa


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


def test_a_failed_save_leaves_the_old_file_and_nothing_else(stirred_moa, tmp_path, monkeypatch):
    path = tmp_path / "moa.safetensors"
    save_moa(stirred_moa, path)
    before = path.read_bytes()

    def disk_full(weights, file, metadata):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("moa_core.moa_file.save_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_moa(stirred_moa, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(MoAFileError, match=r"gone\.safetensors' does not exist.*models/moa"):
        load_moa(tmp_path / "gone.safetensors")
