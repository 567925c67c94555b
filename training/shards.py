"""python -m training.shards: packs a data set of the FFHQ layout into WebDataset shards."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from training.data.shards import write_shards


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.shards", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of a data set in the FFHQ layout")
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--records", type=int, default=1000, help="records per shard (default %(default)s)")
    args = parser.parse_args(argv)
    try:
        count = write_shards(args.data, args.out, args.records)
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print(f"{count} shards in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
