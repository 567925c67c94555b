"""The pack at the size it is made for: SD 1.5 with random weights."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from training.comfyui import make_base_directory


def run(step, folder) -> dict:
    script = Path(__file__).with_name("real_size.py")
    done = subprocess.run([sys.executable, str(script), step, str(folder)], capture_output=True, text=True, timeout=900)
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
    assert sampled["peak_gib"] < 12
