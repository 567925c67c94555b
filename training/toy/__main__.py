"""python -m training.toy <command>"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from training.toy.dataset import render_dataset


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


def add_training(
    commands: argparse._SubParsersAction, name: str, text: str, train, batch: int, lr: float, **flags: str
) -> None:
    """A command that trains one part of the base model; torch is imported when it runs. flags: name, help."""
    command = commands.add_parser(name, help=text, description=text)
    command.add_argument("--run", type=Path, required=True, dest="folder", help="run folder, shared by all parts")
    command.add_argument("--steps", type=int, help="train up to this step")
    command.add_argument("--minutes", type=float, help="stop after so many minutes")
    command.add_argument("--resume", action="store_true", help="go on from the run folder's file")
    command.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    command.add_argument("--batch", type=int, default=batch, help="(default %(default)s)")
    command.add_argument("--lr", type=float, default=lr, help="learning rate (default %(default)s)")
    command.add_argument("--scenes", type=int, default=20_000, help="pictures rendered once (default %(default)s)")
    command.add_argument("--workers", type=int, default=1, help="processes that render them (default %(default)s)")

    for flag, meaning in flags.items():
        command.add_argument(f"--{flag.replace('_', '-')}", action="store_true", help=meaning)

    def run(args: argparse.Namespace) -> None:
        from training.toy.pretrain import Plan

        train()(
            Plan(
                args.folder,
                args.steps,
                args.minutes,
                args.resume,
                args.seed,
                args.batch,
                args.lr,
                args.scenes,
                args.workers,
            ),
            **{flag: getattr(args, flag) for flag in flags},
        )

    command.set_defaults(run=run)


def _vae():
    from training.toy.vae import train_vae

    return train_vae


def _unet():
    from training.toy.diffusion import train_unet

    return train_unet


def _readout():
    from training.toy.readout import train_readout

    return train_readout


def _encoder():
    from training.toy.encoder import train_encoder

    return train_encoder


def add_assemble(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("assemble", help="write the base model as one checkpoint")
    command.add_argument("--run", type=Path, required=True, dest="folder", help="run folder")
    command.add_argument("--out", type=Path, required=True, help="the checkpoint: a .safetensors file")

    def run(args: argparse.Namespace) -> None:
        from training.toy.diffusion import assemble

        assemble(args.folder, args.out)

    command.set_defaults(run=run)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.toy", description="The toy world.")
    commands = parser.add_subparsers(dest="command", required=True)
    add_render(commands)
    add_training(
        commands,
        "vae",
        "train the base model's autoencoder",
        _vae,
        batch=8,
        lr=2e-3,
        decoder_only="leave the encoder as it is",
    )
    add_training(commands, "unet", "train the base model's text encoder and U-Net", _unet, batch=16, lr=1e-3)
    add_assemble(commands)
    add_training(commands, "readout", "train the judges of training.toy.measure", _readout, batch=48, lr=2e-3)
    add_training(commands, "encoder", "train the image encoder that a MoA starts from", _encoder, batch=64, lr=5e-4)
    args = parser.parse_args(argv)
    try:
        args.run(args)
    except ValueError as error:
        print(f"{parser.prog} {args.command}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
