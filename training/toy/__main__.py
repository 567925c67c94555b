"""python -m training.toy <command>"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .dataset import render_dataset


def add_render(commands: argparse._SubParsersAction) -> None:
    render = commands.add_parser("render", help="write a data set of the toy world", description=render_dataset.__doc__)
    render.add_argument("--out", type=Path, required=True, help="folder, new or from an earlier run")
    render.add_argument("--count", type=int, required=True, help="number of pictures, train and test together")
    render.add_argument("--seed", type=int, required=True)
    render.add_argument("--workers", type=int, default=1, help="processes (default %(default)s)")
    render.add_argument(
        "--test-share",
        type=float,
        default=0.05,
        help="share of pictures with held-out people (default %(default)s)",
    )
    render.set_defaults(run=lambda args: render_dataset(args.out, args.count, args.seed, args.workers, args.test_share))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.toy", description="The toy world.")
    commands = parser.add_subparsers(dest="command", required=True)
    add_render(commands)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except ValueError as error:
        print(f"{parser.prog} {args.command}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
