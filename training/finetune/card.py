"""The card that lies beside a MoA file: what whoever gets the file has to know of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from moa_core.files.whole_file import write_whole
from moa_core.learned.moa import MoA
from training.config import Config

BLANK = "(to be filled in)"
FIGURES = ("loss", "reconstruction", "router", "object", "inside", "outside")
"""Of the last step, those that the card tells."""


def write_card(file: Path, moa: MoA, config: Config, records: int, figures: Mapping[str, float]) -> None:
    """Write `moa.md` beside `moa.safetensors` of a finished run.

    records: so many were seen in all its steps, one that came twice counts twice. figures: of its last step.

    A card that is there already stays as it is: somebody may have filled it in.
    """
    path = file.with_suffix(".md")
    if not path.exists():
        write_whole(path, _text(file, moa, config, records, figures).encode())


def _text(file: Path, moa: MoA, config: Config, records: int, figures: Mapping[str, float]) -> str:
    made, optim, loss = moa.config, config.optimizer, config.loss
    names = ", ".join(f"{address}.{attention}" for address, attention in made.layers)
    start = f", from the weights of `{Path(config.model.start).name}`" if config.model.start else ""
    last = ", ".join(f"{name} {figures[name]:.3g}" for name in FIGURES if name in figures)
    lines = [
        f"# {file.stem}",
        "",
        f"A MoA (Mixture-of-Attention) for {made.base}: it puts people from reference pictures into what a checkpoint",
        f"of that family draws. Put `{file.name}` into ComfyUI's `models/moa`; *MoA Loader* then lists it.",
        "",
        f"- **Licence:** {BLANK}. Those of the pictures, of the base model and of the image encoder bind it.",
        f"- **Pictures:** {BLANK}: which, how many, under which licence. They lay in `{Path(config.data.root).name}`.",
        f"- **Experts** in {'all attention layers' if made.is_whole else names}; they act on the timesteps below "
        f"{made.timesteps}.",
        f"- **Training:** {optim.steps:,} steps, {records:,} records in all{start}; AdamW at "
        f"{optim.lr:g}, the subject prompt at {optim.lr * optim.prompt_lr:g}, warm-up {optim.warmup}, cool-down "
        f"{optim.cooldown}; {config.run.precision}, seed {config.run.seed}.",
        f"- **Losses:** router {loss.router:g}, object {loss.object:g}; the reconstruction counts on subjects alone "
        f"in {loss.masked:.0%} of the records; {loss.dropped:.0%} of the captions were emptied.",
        f"- **At the last step:** {last}.",
        f"- **What it reaches:** {BLANK}, measured by `python -m training.evaluate paper`, for example.",
        f"- **What it cannot do:** {BLANK}.",
    ]
    return "\n".join(lines) + "\n"
