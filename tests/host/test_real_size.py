"""The pack at the sizes it is made for: SD 1.5 and SDXL with random weights."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from training.comfyui import make_base_directory


def run(step, folder, script="real_size.py") -> dict:
    command = [sys.executable, str(Path(__file__).with_name(script)), step, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    print(step, figures)
    return figures


def test_sd15_size_through_the_loaders_and_ksampler(tmp_path):
    folder = make_base_directory(tmp_path / "base")
    try:
        made = run("make", folder)
        assert made["checkpoint_gb"] > 1.9 and made["layers"] == 32
        assert 180 < made["experts_and_routers_mb"] < 200
        sampled = run("sample", folder)
    finally:
        shutil.rmtree(folder / "models")
    assert sampled["family"] == "SD15"
    assert sampled["strength_0_bit_exact"]
    assert sampled["moa_changes"] > 1e-3 and sampled["finite"]
    assert sampled["picture"] == [1, 128, 128, 3]
    assert sampled["training_differs"] < 1e-3  # the same file is what training reads as model.base
    assert sampled["peak_gib"] < 12


@pytest.mark.slow
def test_sdxl_size_with_each_kind_of_adapter_through_the_loaders_and_ksampler(tmp_path):
    """IP-Adapter plus, two LoRAs; FaceID-plusv2 beside PhotoMaker. A quarter of an hour on one core; 13 GB of disk,
    14 GiB of memory, of which the host maps half from the checkpoint.
    """
    folder = make_base_directory(tmp_path / "base")
    try:
        made = run("make", folder, "real_sdxl.py")
        assert 6.9 < made["checkpoint_gb"] < 7.0 and 0.84 < made["adapter_gb"] < 0.86 and made["layers"] == 70
        sampled = run("sample", folder, "real_sdxl.py")
        made_faces = run("make_faces", folder, "real_sdxl.py")
        faces = run("sample_faces", folder, "real_sdxl.py")
    finally:
        shutil.rmtree(folder / "models")
    assert sampled["family"] == sampled["base"] == "SDXL" and sampled["tokens"] == [16, 2048]
    assert sampled["strength_0_bit_exact"]
    assert sampled["moa_changes"] > 1e-3 and sampled["finite"]
    assert sampled["masks"] == [2, 256, 256]
    assert sampled["loras_change"] > 1e-3 and sampled["changed_layers"] == 722  # 10 a transformer, 2 round each of 11
    assert sampled["peak_gib"] < 17
    assert 1.3 < made_faces["faceid_gb"] < 1.6 and 0.8 < made_faces["photomaker_gb"] < 1.0  # the published 1.5 and 0.9
    assert faces["finite"] and min(faces["man_changes"], faces["woman_changes"]) > 1e-3
    assert faces["peak_gib"] < 17
