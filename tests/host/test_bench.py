"""`make bench`, on the toy shape alone: it runs to its end, and times what it says."""

import subprocess
import sys

from training.comfyui import PACK


def test_the_benchmark_prints_a_ratio_for_every_variant():
    command = [sys.executable, "-m", "tests.bench", "--shapes", "toy", "--rounds", "1", "--areas", "0.25"]
    printed = subprocess.run(command, cwd=PACK, capture_output=True, text=True, check=True).stdout
    rows = {line[:20].strip(): line[20:].split() for line in printed.splitlines()}
    for name in ("dense", "sparse 25%", "image experts 25%", "image experts 100%", "with IP-Adapter"):
        assert float(rows[name][1]) > 0.1, printed
    assert rows["dense"][3] == rows["image experts 100%"][3] == "100%"
    assert all(10 < int(rows[name][3].rstrip("%")) < 60 for name in ("sparse 25%", "image experts 25%"))
