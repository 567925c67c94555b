"""IP-Adapter files as they are published: image projector, keys and values of every cross-attention, maybe a LoRA."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..address import Address, BlockShape
from ..files.file_error import COMPARE, FileError, unreadable
from ..files.whole_file import whole
from ..subjects.subject import FACE_WIDTH
from .deltas import LowRank
from .image_expert import ImageMixture, file_order
from .image_tokens import POOLED, ImageTokens
from .projector import PERCEIVER, image_tokens

FITTING = "an ip-adapter*_sd15 or ip-adapter*_sdxl(_vit-h) of h94/IP-Adapter, or a file of h94/IP-Adapter-FaceID"
"""Files that this pack reads."""
VIT_H = "CLIP-ViT-H-14 (https://huggingface.co/h94/IP-Adapter/tree/main/models/image_encoder)"
VIT_BIGG = "CLIP-ViT-bigG-14 (https://huggingface.co/h94/IP-Adapter/tree/main/sdxl_models/image_encoder)"
"""The CLIP vision models of the published files, and where they are."""
BUFFALO, ANTELOPE = "buffalo_l", "antelopev2"
"""insightface's sets of models whose embeddings the files read."""
SDXL, SDXL_TEXT = "SDXL", 2048
"""The family, and how wide its text embedding is."""
KOLORS_RESAMPLER = 2048
"""Inner width of the Resampler of Kolors, whose text is as wide as SDXL's; SDXL's Resamplers are 1280 wide inside."""
_LAYER = re.compile(r"(\d+)\.to_([kv])_ip\.weight$")
_LORA = re.compile(r"(\d+)\.to_(q|k|v|out)_lora\.(down|up)\.weight$")


class IPAdapterFileError(FileError):
    """Why an IP-Adapter file is refused."""


@dataclass(eq=False)
class IPAdapter:
    """What an IP-Adapter file holds."""

    mixture: ImageMixture
    projector: ImageTokens
    changes: Mapping[tuple[int, str], LowRank] = field(default_factory=dict)
    """The LoRA of a FaceID file: by the number of a transformer, in the file's order, and the layer in it
    (`attn1.to_q`)."""
    faces: str = ""
    """The set of insightface's models whose embedding it reads; empty: none."""

    def changes_of(
        self, blocks: Mapping[Address, BlockShape], name: Callable[[Address], str], dtype: torch.dtype
    ) -> dict[str, LowRank]:
        """What it changes in a U-Net with these blocks, by the host's names of the layers; name: of a transformer."""
        order = file_order(blocks)
        return {
            f"{name(order[place])}.{layer}": LowRank(change.up.to(dtype), change.down.to(dtype))
            for (place, layer), change in self.changes.items()
        }

    @property
    def family(self) -> str:
        """The base family it is made for, as shown to the user."""
        return SDXL if self.projector.dim == SDXL_TEXT else "SD 1.5"


def load_ip_adapter(path: str | os.PathLike, operations: Any = nn, dtype: torch.dtype = torch.float32) -> IPAdapter:
    """Read an IP-Adapter file onto the CPU. operations and dtype: of the image experts; the projector is in float32.

    Raises IPAdapterFileError for a file that is damaged or of a kind that this pack does not read.
    """
    path = Path(path)
    return ip_adapter_of(path.name, _read(path), operations, dtype)


def ip_adapter_of(
    file: str, weights: Mapping[str, Tensor], operations: Any = nn, dtype: torch.dtype = torch.float32
) -> IPAdapter:
    """What the weights `image_proj.*` and `ip_adapter.*` of a file of that name make. Raises as load_ip_adapter does.

    The name says what the weights do not: which FaceID plus a file is, and which model's faces it knows.
    """
    image = {name.removeprefix("image_proj."): w for name, w in weights.items() if name.startswith("image_proj.")}
    layers = {name.removeprefix("ip_adapter."): w for name, w in weights.items() if name.startswith("ip_adapter.")}
    _refuse_others(file, image, layers)
    is_v2, faces = _is_v2(file, image), _faces(file, image)
    try:
        projector = image_tokens({name: weight.float() for name, weight in image.items()}, is_v2)
        mixture = _mixture(layers, projector, operations, dtype)
        changes = _changes(layers, mixture.shapes)
    except (KeyError, ValueError, RuntimeError, IndexError) as error:
        raise IPAdapterFileError(
            file,
            f"is damaged or of a new kind ({error})",
            f"download it again, or use {FITTING}",
        ) from error
    return IPAdapter(mixture, projector, changes, faces)


def save_ip_adapter(adapter: IPAdapter, path: str | os.PathLike, dtype: torch.dtype = torch.float16) -> None:
    """Write an IP-Adapter file, whole or not at all."""
    weights = {f"image_proj.{name}": weight for name, weight in adapter.projector.state_dict().items()}
    for place, layer in enumerate(adapter.mixture.layers):
        for kind, projection in (("k", layer.to_k), ("v", layer.to_v)):
            weights[f"ip_adapter.{2 * place + 1}.to_{kind}_ip.weight"] = projection.weight
    stored = {name: weight.detach().to("cpu", dtype).contiguous() for name, weight in weights.items()}
    with whole(Path(path)) as unfinished:
        save_file(stored, unfinished, {"format": "pt"})


def vision_model(projector: ImageTokens) -> str:
    """What CLIP vision model the projector reads, for messages."""
    pooled = projector.reads == POOLED
    known = {1024: VIT_H, 1280: VIT_BIGG} if pooled else {1280: VIT_H}
    output = "image embeddings" if pooled else "hidden states"
    return f"{known.get(projector.width, 'one')} with {output} {projector.width} wide"


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except FileNotFoundError:
        raise IPAdapterFileError(
            str(path), "does not exist", "put the IP-Adapter file into ComfyUI's models/ipadapter folder"
        ) from None
    except (SafetensorError, OSError) as error:
        raise IPAdapterFileError(path.name, unreadable(path, error), COMPARE) from error


def _refuse_others(file: str, image: dict[str, Tensor], layers: dict[str, Tensor]) -> None:
    """Files of other kinds, each with its reason."""
    if not image or not layers:
        reason = "is no IP-Adapter for a U-Net: expected weights named image_proj.* and ip_adapter.*"
    elif "latents" in image and image["latents"].shape[-1] == KOLORS_RESAMPLER:
        reason = "is for Kolors, which reads its prompts with another kind of text encoder"
    elif not all(_LAYER.match(name) or _LORA.match(name) for name in layers):
        reason = "is for another family of models (Flux, for example)"
    else:
        return
    raise IPAdapterFileError(file, reason, f"get {FITTING}")


def _is_v2(file: str, image: dict[str, Tensor]) -> bool:
    """Whether a FaceID plus file is of the second version. Raises IPAdapterFileError where its name says neither."""
    if not any(name.startswith(PERCEIVER) for name in image):
        return False
    name = _letters(file)
    if "plus" not in name:
        raise IPAdapterFileError(
            file,
            "is a FaceID plus file, and whether of version 1 or 2 its weights do not say",
            "give it back its name: one with 'faceid-plus' is read as version 1, with 'faceid-plusv2' as version 2",
        )
    return "plusv2" in name


def _faces(file: str, image: dict[str, Tensor]) -> str:
    """The set of insightface's models that the file's faces come from; empty: it reads none.

    Raises IPAdapterFileError for a file of two possible origins whose name says neither.
    """
    if "latents" not in image:
        return BUFFALO if "proj.2.weight" in image and "norm.weight" in image else ""
    if image["latents"].ndim != 3 or image.get("proj_in.weight", image["latents"]).shape[-1] != FACE_WIDTH:
        return ""
    name = _letters(file)
    if "portrait" not in name and "instant" not in name:
        raise IPAdapterFileError(
            file,
            "reads faces as FaceID portrait unnorm or as InstantID does, and its weights do not say which",
            "give it a name with 'portrait' (faces of insightface's buffalo_l) or 'instantid' (of antelopev2)",
        )
    return BUFFALO if "portrait" in name else ANTELOPE


def _letters(file: str) -> str:
    """A file's name without what people put between its parts."""
    return re.sub(r"[^a-z0-9]", "", Path(file).stem.lower())


def _mixture(layers: dict[str, Tensor], projector: ImageTokens, operations: Any, dtype: torch.dtype) -> ImageMixture:
    """Raises KeyError or RuntimeError for keys without values or of other widths than the tokens."""
    numbers = sorted({int(found[1]) for found in map(_LAYER.match, layers) if found})
    weights = {
        f"layers.{place}.to_{kind}.weight": layers[f"{number}.to_{kind}_ip.weight"].to(dtype)
        for place, number in enumerate(numbers)
        for kind in "kv"
    }
    shapes = [BlockShape(*layers[f"{number}.to_k_ip.weight"].shape) for number in numbers]
    if any(shape.context_dim != projector.dim for shape in shapes):
        raise ValueError(f"tokens are {projector.dim} wide, the layers read {shapes[0].context_dim}")
    with torch.device("meta"):
        mixture = ImageMixture(shapes, projector.count, operations)
    mixture.negative = torch.zeros(projector.count, projector.dim)
    mixture.load_state_dict(weights, assign=True)
    return mixture.eval().requires_grad_(False)


def _changes(layers: dict[str, Tensor], shapes: list[BlockShape]) -> dict[tuple[int, str], LowRank]:
    """The file's LoRA: it counts all attention layers, of each transformer the one to itself and the one to the text.

    Raises KeyError or ValueError for matrices that do not fit together.
    """
    changes = {}
    for name in layers:
        found = _LORA.match(name)
        if found and found[3] == "down":
            down, up = layers[name], layers[name.replace("down", "up")]
            (place, crosses), layer = divmod(int(found[1]), 2), found[2]
            dim, context_dim = (shapes[place].dim, shapes[place].context_dim) if place < len(shapes) else (0, 0)
            read = context_dim if crosses and layer in "kv" else dim
            if (up.shape[0], down.shape[-1]) != (dim, read) or up.shape[1:] != down.shape[:1]:
                raise ValueError(f"{name} is {list(down.shape)}, its other half {list(up.shape)}")
            changes[place, f"attn{1 + crosses}.to_{'out.0' if layer == 'out' else layer}"] = LowRank(up, down)
    return changes
