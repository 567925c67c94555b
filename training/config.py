"""How a finetune runs: one dataclass for each section of its YAML file. Defaults are the paper's
(Table 1) where it gives them."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import yaml


class ConfigError(ValueError):
    """A sentence for the user: the file, the key, what was expected, what was found."""


@dataclass(frozen=True)
class Model:
    """What is finetuned, and from what."""

    base: str
    """The frozen base model: a Stable Diffusion 1.x folder in diffusers' format, or a toy checkpoint (a file)."""
    image_encoder: str = ""
    """Folder of a transformers CLIP vision model with projection: CLIP ViT-L/14, as FastComposer; Table 1 has none.
    With `start` it is that file's."""
    start: str = ""
    """A MoA file to go on from, instead of experts that equal the prior: its weights, its layers, its image encoder."""
    trainable_encoder_layers: int = 2
    """So many last layers of the image encoder learn along, with what follows them. The paper says "learned image
    encoder" without a number; 2 is FastComposer's. With 0 it stays as it is."""
    router_hidden: int = 64
    """Hidden width of every router; the paper gives none."""
    method: Literal["moa", "moa_without_spacetime", "cross_attention", "fastcomposer", "ip_adapter"] = "moa"
    """MoA, or what it is compared with (training/finetune/methods.py)."""


@dataclass(frozen=True)
class Augmentation:
    """How a subject's reference is varied, each way with this probability. The paper is silent, so none is the default;
    the ways, and the values in ffhq.yaml, are FastComposer's."""

    zoom: float = 0.0
    """Of someone taller than wide only the upper square: head and shoulders."""
    rotation: float = 0.0
    """By up to 30 degrees either way."""
    jitter: float = 0.0
    """Brightness, contrast and saturation by up to a half, and any hue."""
    blur: float = 0.0
    grey: float = 0.0
    flip: float = 0.0
    """Left for right."""
    elastic: float = 0.0
    """Bent, as seen through water."""


@dataclass(frozen=True)
class Data:
    """The pictures, in the FFHQ layout (training/data/records.py)."""

    root: str
    size: int = 0
    """Side of the training pictures in pixels; 0 is the base model's own, SD 1.5's 512. Table 1 gives none."""
    max_subjects: int = 4
    """Of more people in a picture the largest are kept."""
    smallest_crop: float = 0.8
    """Random squares have this share of the shorter side at least."""
    min_area: float = 0.01
    """A subject that covers less of the square is left out."""
    background: Literal["neutral", "random", "noise"] = "random"
    """What replaces the background of a reference: the neutral colour of its use, a random one, or a random one for
    each pixel, as in FastComposer."""
    appear: float = 1.0
    """Probability of each subject to be bound; the others stay words, as in a prompt with two men of whom one is a
    subject. The paper is silent; FastComposer (object_appear_prob): 0.9."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    cached_latents: bool = False
    """Latents are read from files (training/data/latents.py), which saves the autoencoder's work in every step;
    pictures are then the largest squares in the middle instead of random ones."""
    workers: int = 4
    """Processes that read pictures, for each GPU; 0 reads in the training's own process."""


@dataclass(frozen=True)
class Loss:
    """What is minimized (eq. 11), and on which steps of the diffusion."""

    router: float = 1e-4
    """Weight of the router loss (eq. 10), a sum over the latent's pixels: at 64x64 this is 0.41 on their mean."""
    object: float = 1e-4
    """Weight of the object loss (eq. 12), a difference of two means, which knows no number of pixels."""
    object_blocks: Literal["all", "routed"] = "all"
    """Blocks whose cross-attention the object loss reads. The paper names none; "routed" are those of the router loss,
    without the first two and last three of sixteen: the eleven that FastComposer reads."""
    masked: float = 1.0
    """Share of records whose error counts on the subjects alone, not on the whole picture. Table 1: probability 1."""
    margin: int = 0
    """Latent pixels around the subjects that count as theirs, to learn where a hair style ends. Paper: none."""
    min_snr: float = 0.0
    """Gamma of the min-SNR weighting of timesteps (Hang et al., 2023); 0, as in the paper, weighs all alike."""
    dropped: float = 0.1
    """Share of records whose caption is emptied, for classifier-free guidance. Table 1: 10%."""
    timesteps: int = 800
    """Timesteps are drawn below this, and the MoA acts on no others. Table 1: 800, of 1000."""


@dataclass(frozen=True)
class Optimizer:
    """AdamW at a constant rate, unless `warmup` or `cooldown` change it."""

    lr: float = 5e-5
    """Table 1: 5e-5 (the paper's text says 1e-5)."""
    prompt_lr: float = 1.0
    """The subject prompt's rate as a multiple of `lr`: it starts from nothing, the experts from the prior. Paper: 1."""
    weight_decay: float = 1e-2
    """AdamW's own default; the paper gives none."""
    clip: float = 1.0
    """Largest norm of the gradient; the paper gives none."""
    warmup: int = 0
    """Steps in which the rate rises to its value."""
    cooldown: int = 0
    """Last steps, in which the rate falls to nothing: the noise of the steps settles. Paper: none."""
    eight_bit: bool = False
    """Moments in 8 bits, by bitsandbytes, which is to be installed beside: of SD 1.5 it saves 0.75 GB."""
    batch: int = 32
    """Records for each GPU and pass. Table 1: 4 GPUs x 32."""
    accumulate: int = 1
    """Passes that make one step."""
    steps: int = 40_000
    """Table 1: 40k."""


@dataclass(frozen=True)
class Run:
    """Where it goes, and how."""

    out: str
    """Folder for checkpoints, contact sheets, TensorBoard and the file that the nodes load."""
    file: str = "moa.safetensors"
    """Its name: a MoA, or for the method `ip_adapter` an IP-Adapter."""
    seed: int = 0
    precision: Literal["float32", "bf16"] = "bf16"
    """Not in Table 1. On a CPU without AMX float32 is faster."""
    checkpointing: bool = False
    """Gradient checkpointing: less memory, about a third more time."""
    save_every: int = 1000
    """Steps between checkpoints."""
    keep: int = 2
    """So many checkpoints are kept, the newest."""
    validate_every: int = 1000
    """Steps between contact sheets; 0 draws none."""


@dataclass(frozen=True)
class Config:
    model: Model
    data: Data
    run: Run
    loss: Loss = field(default_factory=Loss)
    optimizer: Optimizer = field(default_factory=Optimizer)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def read_config(path: str | Path) -> Config:
    """Read a YAML file. Raises ConfigError for anything that is not as the dataclasses above say."""
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: give a configuration such as training/configs/toy.yaml") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no YAML file: {error}") from error
    return config_of(path, content)


def config_of(path: Path, content: Any) -> Config:
    """From what `to_dict` gave, as the file at this path keeps it. Raises ConfigError."""
    return _section(path, "", Config, content)


def _section(path: Path, name: str, kind: type, content: Any) -> Any:
    """One dataclass from a mapping, every key and type checked."""
    where = f"section '{name}'" if name else "the file"
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: {where} must hold keys and values, found {content!r}")
    hints = get_type_hints(kind)
    for key in content:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.0)
            raise ConfigError(f"{path}: {where} has the unknown key '{key}'; did you mean '{near[0]}'?")
    required = {f.name for f in dataclasses.fields(kind) if _required(f)}
    if missing := sorted(required - content.keys()):
        raise ConfigError(f"{path}: {where} lacks {', '.join(missing)}")
    values = {}
    for key, value in content.items():
        inner = f"{name}.{key}" if name else key
        nested = dataclasses.is_dataclass(hints[key])
        values[key] = _section(path, inner, hints[key], value) if nested else _value(path, inner, hints[key], value)
    return kind(**values)


def _required(f: dataclasses.Field) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _value(path: Path, key: str, kind: Any, value: Any) -> Any:
    if kind is float and type(value) is str:
        with contextlib.suppress(ValueError):  # YAML reads 1e-4, without a dot, as text
            value = float(value)
    if kind is float and type(value) is int:
        value = float(value)
    choices = get_args(kind)
    if choices and value not in choices:
        raise ConfigError(f"{path}: {key} must be one of {', '.join(choices)}, found {value!r}")
    if not choices and type(value) is not kind:
        raise ConfigError(f"{path}: {key} must be {_NAMES[kind]}, found {value!r}")
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{path}: {key} must be a number that is finite, found {value!r}")
    if kind in (int, float) and value < 0:
        raise ConfigError(f"{path}: {key} must not be negative, found {value!r}")
    return value


_NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
