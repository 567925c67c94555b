"""python -m training.prepare: pictures of people -> the FFHQ layout that `training.train` reads.

As FastComposer prepared FFHQ: BLIP-2 writes a caption, Mask2Former finds the people, and CLIP says which
noun phrase of the caption is which of them. Records that are there already are kept, so a stopped run goes on.
With --base, training.latents follows. Under `accelerate launch` its processes share the work.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from training.data.annotate import Annotator, annotate_pictures
from training.data.dataset import TooManyBroken
from training.data.latents import write_latents
from training.data.processes import processes
from training.host.pretrained import load_base


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.prepare", description=__doc__.split("\n\n")[0])
    parser.add_argument("--pictures", type=Path, required=True, help="folder of pictures, searched to its bottom")
    parser.add_argument("--out", type=Path, required=True, help="folder of the data set, new or from an earlier run")
    parser.add_argument("--captioner", type=Path, required=True, help="folder of a BLIP-2 (blip2-opt-2.7b)")
    parser.add_argument(
        "--segmenter", type=Path, required=True, help="folder of a Mask2Former trained on COCO panoptic"
    )
    parser.add_argument("--matcher", type=Path, required=True, help="folder of a CLIP (clip-vit-large-patch14)")
    parser.add_argument("--batch", type=int, default=8, help="(default %(default)s)")
    parser.add_argument("--workers", type=int, default=4, help="processes that read pictures (default %(default)s)")
    parser.add_argument("--base", type=Path, help="what model.base of the training is: caches the pictures' latents")
    parser.add_argument("--size", type=int, default=0, help="data.size of the training (default: the base model's own)")
    args = parser.parse_args(argv)
    state = processes()
    try:
        base = load_base(args.base) if args.base else None  # what is wrong with it is said before the captions
        annotator = Annotator(args.captioner, args.segmenter, args.matcher, state.device)
        useful = annotate_pictures(args.pictures, args.out, annotator, args.batch, args.workers)
        if base is not None:
            size = args.size or base.picture_size
            write_latents(args.out, base.autoencoder.to(state.device), size, args.batch, args.workers)
    except (OSError, ValueError, TooManyBroken) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    if state.is_main_process:
        print(f"{useful} records with people in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
