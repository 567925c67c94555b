"""python -m training.latents: the latents of a data set's pictures, computed once instead of in every step.

Under `accelerate launch` its processes share the work.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from training.data.dataset import TooManyBroken
from training.data.latents import write_latents
from training.data.processes import processes
from training.host.pretrained import load_base


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.latents", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--data", type=Path, required=True, help="folder of a data set in the FFHQ layout")
    parser.add_argument("--base", type=Path, required=True, help="what model.base of the training is")
    parser.add_argument("--size", type=int, default=0, help="data.size of the training (default: the base model's own)")
    parser.add_argument("--batch", type=int, default=8, help="(default %(default)s)")
    parser.add_argument("--workers", type=int, default=4, help="processes that read pictures (default %(default)s)")
    args = parser.parse_args(argv)
    state = processes()
    try:
        base = load_base(args.base).to(state.device)
        size = args.size or base.picture_size
        written = write_latents(args.data, base.autoencoder, size, args.batch, args.workers)
    except (OSError, ValueError, TooManyBroken) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    if state.is_main_process:
        print(f"{written} records' latents written, the others were there; in {args.data}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
