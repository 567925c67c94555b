"""python -m training.toy <command>"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from toy_world.world import WORDS
from training.toy.dataset import render_dataset


@dataclass(frozen=True)
class Part:
    """A part of the toy world's models: what trains it (imported when it runs), and how by default."""

    text: str
    train: str
    """`module.function` in training/toy/pretrain."""
    batch: int
    lr: float


PARTS = {
    "vae": Part("train the base model's autoencoder", "autoencoder.train_vae", batch=16, lr=2e-3),
    "unet": Part("train the base model's text encoder and U-Net", "unet.train_unet", batch=16, lr=1e-3),
    "readout": Part("train the judges of training.toy.measure", "judges.train_readout", batch=48, lr=2e-3),
    "controlnet": Part("train a pose ControlNet", "controlnet.train_controlnet", batch=16, lr=1e-3),
    "style-lora": Part("train a LoRA of another drawing style", "style_lora.train_style_lora", batch=16, lr=1e-3),
    "person-lora": Part("train a LoRA of one person", "person_lora.train_person_lora", batch=16, lr=1e-3),
    "encoder": Part("train the image encoder that a MoA starts from", "encoder.train_encoder", batch=64, lr=5e-4),
}

ON_BASE = ("controlnet", "style-lora", "person-lora")
"""They are trained on a finished base model."""
OF_BASE = ("vae", "unet")
"""The base model itself."""
COMPILED = (*OF_BASE, *ON_BASE)
"""The long ones, where compiling pays."""


def add_part(commands: argparse._SubParsersAction, name: str, part: Part) -> None:
    command = commands.add_parser(name, help=part.text, description=part.text)
    command.add_argument("--run", type=Path, required=True, help="run folder, shared by all parts")
    command.add_argument("--steps", type=int, required=True, help="train up to this step, at a rate that falls to 0")
    command.add_argument("--minutes", type=float, help="stop early after so many minutes")
    command.add_argument("--resume", action="store_true", help="go on from the run folder's file, along the same curve")
    command.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    command.add_argument("--batch", type=int, default=part.batch, help="(default %(default)s)")
    command.add_argument("--lr", type=float, default=part.lr, help="learning rate (default %(default)s)")
    if name == "person-lora":
        command.add_argument("--word", choices=WORDS, required=True, help="what the captions call the person")
        command.add_argument("--person", type=int, required=True, help="the seed of Toy Subject that is this person")
    else:
        command.add_argument("--scenes", type=int, default=20_000, help="pictures rendered once (default %(default)s)")
        command.add_argument("--workers", type=int, default=1, help="processes that render them (default %(default)s)")
    if name in ON_BASE:
        command.add_argument("--base", type=Path, required=True, help="the checkpoint that `assemble` wrote")
    if name in OF_BASE:
        command.add_argument("--base", type=Path, help="start from this checkpoint's weights instead of random ones")
    if name in COMPILED:
        command.add_argument("--compiled", action="store_true", help="compile the loss first (needs a C++ compiler)")
    command.set_defaults(act=lambda options: _train(part, options))


def _train(part: Part, options: dict) -> None:
    from training.toy.pretrain.loop import Plan

    module, function = part.train.split(".")
    who = {name: options.pop(name) for name in ("word", "person") if name in options}
    getattr(import_module(f"training.toy.pretrain.{module}"), function)(Plan(**options), **who)


def add_render(commands: argparse._SubParsersAction) -> None:
    render = commands.add_parser("render", help="write a data set of the toy world", description=render_dataset.__doc__)
    render.add_argument("--out", type=Path, required=True, help="folder, new or from an earlier run")
    render.add_argument("--count", type=int, required=True, help="number of pictures, train and test together")
    render.add_argument("--seed", type=int, required=True)
    render.add_argument("--workers", type=int, default=1, help="processes (default %(default)s)")
    render.add_argument(
        "--test-share", type=float, default=0.05, help="share of pictures with held-out people (default %(default)s)"
    )
    render.set_defaults(act=lambda options: render_dataset(**options))


def add_assemble(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("assemble", help="write the base model as one checkpoint")
    command.add_argument("--run", type=Path, required=True, help="run folder")
    command.add_argument("--out", type=Path, required=True, help="the checkpoint: a .safetensors file")

    def assemble(options: dict) -> None:
        from training.toy.pretrain.unet import assemble

        assemble(**options)

    command.set_defaults(act=assemble)


def add_latent_rgb(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser("latent-rgb", help="print the colours of the base model's latents, for previews")
    command.add_argument("--base", type=Path, required=True, help="the checkpoint that `assemble` wrote")

    def latent_rgb(options: dict) -> None:
        from training.toy.pretrain.latent_rgb import print_latent_rgb

        print_latent_rgb(**options)

    command.set_defaults(act=latent_rgb)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.toy", description="The toy world.")
    commands = parser.add_subparsers(dest="command", required=True)
    add_render(commands)
    for name, part in PARTS.items():
        add_part(commands, name, part)
    add_assemble(commands)
    add_latent_rgb(commands)
    options = vars(parser.parse_args(argv))
    command, act = options.pop("command"), options.pop("act")
    try:
        act(options)
    except ValueError as error:
        print(f"{parser.prog} {command}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
