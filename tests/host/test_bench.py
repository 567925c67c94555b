"""`make bench`, on the toy shape alone: it runs to its end, and times what it says."""

import subprocess
import sys

from training.comfyui import PACK


def test_the_benchmark_prints_a_ratio_for_every_variant():
    command = [sys.executable, "-m", "tests.bench", "--shapes", "toy", "--rounds", "1", "--areas", "0.25"]
    printed = subprocess.run(command, cwd=PACK, capture_output=True, text=True, check=True).stdout
    rows = {line[:20].strip(): line[20:].split() for line in printed.splitlines()}
    loras = ("1 LoRA subject", "2 LoRA subjects", "Load LoRA, 2", "masked hooks, 2")
    for name in ("dense", "sparse 25%", "image experts 25%", "image experts 100%", *loras, "with IP-Adapter"):
        assert float(rows[name][1]) > 0.1, printed
    assert rows["dense"][3] == "100%" and 10 < int(rows["sparse 25%"][3].rstrip("%")) < 60
