"""python -m training.vital: which attention layers of a MoA need an expert, and the MoA with experts in those alone.

Each layer's expert is left out in turn over some prompts, and the people in the pictures are seen to move or not
(training/evaluation/vital_layers.py). Beside the new MoA lies its configuration for training on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import yaml

from moa_core.address import Layer
from moa_core.files.whole_file import write_whole
from moa_core.learned.moa import MoA
from moa_core.learned.moa_file import MoAFileError, load_moa, save_moa
from toy_world.shape import BASE as TOY
from training.data.dataset import TooManyBroken
from training.data.layout import EmptySplit
from training.evaluation.vital_layers import Moved, RecordsViewer, Viewer, Vital, droppable
from training.host.base import Base, BaseError
from training.host.pretrained import load_base
from training.toy.vital import ToyViewer

CONFIGS = Path(__file__).parent / "configs"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.vital", description=__doc__.split(": ", 1)[1])
    parser.add_argument("--base", type=Path, required=True, help="the base model: a folder, or a toy checkpoint")
    parser.add_argument("--moa", type=Path, required=True, help="a MoA file, trained with experts in all its layers")
    parser.add_argument("--data", type=Path, required=True, help="the data set whose test records are drawn")
    parser.add_argument("--prompts", type=int, default=12, help="how many prompts are drawn (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="the MoA file to write, with experts where they count")
    much = parser.add_mutually_exclusive_group()
    much.add_argument("--keep", type=int, help="so many layers keep their expert")
    loss = "people may move so far, as a part of their way to the prior's own people (%(default)s)"
    much.add_argument("--loss", type=float, default=0.2, help=loss)
    args = parser.parse_args(argv)
    try:
        if args.out.suffix != ".safetensors" or args.prompts < 1:
            raise ValueError(
                f"--out is {args.out} and --prompts {args.prompts}: give a .safetensors file, and 1 or more"
            )
        args.out.parent.mkdir(parents=True, exist_ok=True)  # said before the work, not after it
        base, moa = load_base(args.base), load_moa(args.moa)
        if args.keep is not None and not 0 < args.keep <= len(moa.config.layers):
            raise ValueError(f"--keep is {args.keep}: {args.moa} has {len(moa.config.layers)} layers with an expert")
        viewer = viewer_of(base, moa, args.data, args.prompts)
        kept = vital(moa, viewer, args.keep, args.loss)
    except (BaseError, MoAFileError, EmptySplit, TooManyBroken, OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    save_moa(kept, args.out)
    config = args.out.with_suffix(".yaml")
    write_whole(config, configuration(args, base).encode())
    print(f"{args.out} has experts in {len(kept.config.layers)} of {len(moa.config.layers)} layers; to train it on:")
    print(f"python -m training.train --config {config}")
    return 0


def viewer_of(base: Base, moa: MoA, data: Path, prompts: int) -> Viewer:
    base.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return ToyViewer(base, prompts) if base.family == TOY else RecordsViewer(base, moa, data, prompts)


@torch.no_grad()
def vital(moa: MoA, viewer: Viewer, keep: int | None, loss: float) -> MoA:
    """The MoA with the layers that count, of which it prints the table."""
    watched = Vital(moa, viewer)
    print(f"{'without the expert of':24}{'people move':>14}{'their pixels':>14}")

    def tell(layer: Layer, moved: Moved) -> None:
        print(f"{f'{layer[0]}.{layer[1]}':24}{moved.seen:14.3f}{moved.pixels:14.4f}", flush=True)

    order = watched.each(tell)
    if keep is None:
        dropped = watched.within(loss, order)
    else:
        dropped = order[: len(moa.config.layers) - keep]
        if not droppable(moa, dropped):
            raise ValueError(f"--keep {keep} leaves no cross-attention, through which alone subjects speak: keep more")
    if dropped:
        moved = watched.without(dropped)
        print(f"{f'all but {len(moa.config.layers) - len(dropped)}':24}{moved.seen:14.3f}{moved.pixels:14.4f}")
    return moa.with_experts_in([layer for layer in moa.config.layers if layer not in dropped])


def configuration(args: argparse.Namespace, base: Base) -> str:
    """For training the new MoA on: its family's, from these files."""
    name = "toy-vital.yaml" if base.family == TOY else "ffhq-vital.yaml"
    config = yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))
    config["model"] |= {"base": str(args.base), "start": str(args.out)}
    config["data"]["root"] = str(args.data)
    config["run"] |= {"out": str(args.out.with_suffix("")), "file": args.out.name}
    return yaml.safe_dump(config, sort_keys=False)


if __name__ == "__main__":
    sys.exit(main())
