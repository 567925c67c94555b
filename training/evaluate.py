"""python -m training.evaluate toy|paper: how well a MoA works.

toy    MoA beside its baselines in the toy world -> training/RESULTS.md
paper  the paper's figures of a MoA, measured as FastComposer's script does, with MTCNN, FaceNet and CLIP
       (training/evaluation/paper.py); under `accelerate launch` its processes share the work
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

from moa_core.files.whole_file import write_whole
from training.config import read_config
from training.data.processes import processes
from training.evaluation.paper import Sampling, paper
from training.evaluation.report import table
from training.toy.comparison import CONTENDERS, STEPS, compare
from training.toy.results import PICTURE, report

HERE = Path(__file__).parent


BUDGET = (
    "Six rows are trained for --steps steps each, at a rate that falls to nothing over their second half; then all are "
    f"drawn and judged. {STEPS} steps are a CPU's budget: for the IP-Adapter 70 minutes on one core with AVX2 (2.1 s a "
    "step), for a MoA 100; on a GPU give --steps 6000 --seeds 2 (an H100 ran 3000 steps of all six, side by side, in 6 "
    "minutes). It goes on where it was stopped. To cut it, name --rows, or lower --steps (at 600 no row had learnt its "
    "people), in a --run of its own."
)


def add_toy(commands: argparse._SubParsersAction) -> None:
    text = "MoA beside its baselines in the toy world -> training/RESULTS.md"
    toy = commands.add_parser("toy", help=text, description=f"{text}. {BUDGET}")
    toy.add_argument("--run", type=Path, default=Path("runs/toy/evidence"), help="runs and figures (%(default)s)")
    toy.add_argument("--steps", type=int, default=STEPS, help="of every row's training (%(default)s; on a GPU 6000)")
    toy.add_argument("--seeds", type=int, default=1, help="trainings of every row (%(default)s; on a GPU 2)")
    names = [row.name for row in CONTENDERS]
    rows = f"train and judge these alone, of: {'; '.join(names)}"
    toy.add_argument("--rows", nargs="+", choices=names, default=names, metavar="ROW", help=rows)
    toy.set_defaults(run_mode=_toy)


def _toy(args: argparse.Namespace) -> str:
    args.run.mkdir(parents=True, exist_ok=True)
    if min(args.steps, args.seeds) < 1:
        raise ValueError(f"--steps is {args.steps}, --seeds is {args.seeds}: both must be 1 or more")
    contenders = [row for row in CONTENDERS if row.name in args.rows]
    config = read_config(HERE / "configs/toy.yaml")
    text = report(compare(config, args.run, args.steps, args.seeds, contenders=contenders))
    Image.open(args.run / "evidence.png").save(HERE / PICTURE, quality=80)
    write_whole(HERE / "RESULTS.md", text.encode())
    return text


def add_paper(commands: argparse._SubParsersAction) -> None:
    text = "identity by MTCNN and FaceNet, prompt by CLIP, of a MoA and of the prior"
    one = commands.add_parser("paper", help=text, description=f"{text}. Defaults are those of FastComposer's script.")
    one.add_argument("--base", type=Path, required=True, help="Stable Diffusion 1.5 folder in diffusers' format")
    what = one.add_mutually_exclusive_group(required=True)
    what.add_argument("--moa", type=Path, help="MoA file")
    what.add_argument("--run", type=Path, help="in its place the run.out of a training of any model.method")
    one.add_argument("--subjects", type=Path, required=True, help="folder with a folder of pictures per subject")
    one.add_argument(
        "--prompts",
        type=Path,
        required=True,
        help="text file, one prompt with <subject> a line; or FastComposer's evaluation/single_object/data.py",
    )
    one.add_argument("--out", type=Path, required=True, help="folder of the results, new or from an earlier run")
    one.add_argument("--facenet", type=Path, required=True, help="FaceNet's weights as .safetensors")
    one.add_argument("--clip", type=Path, required=True, help="folder of a CLIP (clip-vit-large-patch14)")
    one.add_argument("--images", type=int, default=4, help="for each subject and prompt (default %(default)s)")
    one.add_argument("--all-pictures", action="store_true", help="use all of a subject's pictures, not its first")
    one.add_argument("--steps", type=int, default=50, help="of UniPC (default %(default)s)")
    one.add_argument("--cfg", type=float, default=5.0, help="(default %(default)s)")
    one.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    one.set_defaults(run_mode=_paper)


def _paper(args: argparse.Namespace) -> str:
    names = ("base", "moa", "run", "subjects", "prompts", "out", "facenet", "clip", "images", "all_pictures")
    return table(paper(**{n: getattr(args, n) for n in names}, sampling=Sampling(args.steps, args.cfg, args.seed)))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__.split(": ", 1)[1])
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(required=True)
    add_toy(commands)
    add_paper(commands)
    args = parser.parse_args(argv)
    try:
        text = args.run_mode(args)
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    if processes().is_main_process:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
