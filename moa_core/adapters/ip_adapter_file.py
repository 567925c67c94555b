"""IP-Adapter files as they are published: image projector, and keys and values of every cross-attention."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..address import BlockShape
from ..files.file_error import COMPARE, FileError, unreadable
from ..files.whole_file import whole
from .image_expert import ImageMixture
from .image_tokens import POOLED, ImageTokens, image_tokens

FITTING = "ip-adapter(_light, -plus, -plus-face, -full-face)_sd15 or ip-adapter(-plus, -plus-face)_sdxl(_vit-h)"
"""Files that this pack reads."""
VIT_H = "CLIP-ViT-H-14 (https://huggingface.co/h94/IP-Adapter/tree/main/models/image_encoder)"
VIT_BIGG = "CLIP-ViT-bigG-14 (https://huggingface.co/h94/IP-Adapter/tree/main/sdxl_models/image_encoder)"
"""The CLIP vision models of the published files, and where they are."""
SDXL, SDXL_TEXT = "SDXL", 2048
"""The family, and how wide its text embedding is."""
KOLORS_RESAMPLER = 2048
"""Inner width of the Resampler of Kolors, whose text is as wide as SDXL's; SDXL's Resamplers are 1280 wide inside."""
_LAYER = re.compile(r"(\d+)\.to_([kv])_ip\.weight$")


class IPAdapterFileError(FileError):
    """Why an IP-Adapter file is refused."""


@dataclass
class IPAdapter:
    """What an IP-Adapter file holds."""

    mixture: ImageMixture
    projector: ImageTokens

    @property
    def family(self) -> str:
        """The base family it is made for, as shown to the user."""
        return SDXL if self.projector.dim == SDXL_TEXT else "SD 1.5"


def load_ip_adapter(path: str | os.PathLike, operations: Any = nn, dtype: torch.dtype = torch.float32) -> IPAdapter:
    """Read an IP-Adapter file onto the CPU. operations and dtype: of the image experts; the projector is in float32.

    Raises IPAdapterFileError for a file that is damaged or of a kind that this pack does not read.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise IPAdapterFileError(
            path.name,
            "is a pickle, which can run code and is not read",
            "get the .safetensors file of its name from where it came from, or convert it (torch.load with "
            "weights_only=True, then safetensors.torch.save_file, names joined by dots: image_proj.*, ip_adapter.*)",
        )
    weights = _read(path)
    image = {name.removeprefix("image_proj."): w for name, w in weights.items() if name.startswith("image_proj.")}
    layers = {name.removeprefix("ip_adapter."): w for name, w in weights.items() if name.startswith("ip_adapter.")}
    _refuse_others(path, image, layers)
    try:
        projector = image_tokens({name: weight.float() for name, weight in image.items()})
        mixture = _mixture(layers, projector, operations, dtype)
    except (KeyError, ValueError, RuntimeError, IndexError) as error:
        raise IPAdapterFileError(
            path.name,
            f"is damaged or of a new kind ({error})",
            f"download it again, or use {FITTING}",
        ) from error
    return IPAdapter(mixture, projector)


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


def _refuse_others(path: Path, image: dict[str, Tensor], layers: dict[str, Tensor]) -> None:
    """Files of other kinds, each with its reason."""
    unpooled = "norm.weight" in image and "proj.weight" not in image
    if unpooled or any(name.startswith("perceiver_resampler.") for name in image) or any("lora" in n for n in layers):
        reason = "is a FaceID file, which needs the face embeddings of insightface"
    elif not image or not layers:
        reason = "is no IP-Adapter for a U-Net: expected weights named image_proj.* and ip_adapter.*"
    elif "latents" in image and image["latents"].shape[-1] == KOLORS_RESAMPLER:
        reason = "is for Kolors, which reads its prompts with another kind of text encoder"
    elif not all(_LAYER.match(name) for name in layers):
        reason = "is for another family of models (Flux, for example)"
    else:
        return
    raise IPAdapterFileError(path.name, reason, f"get {FITTING} as .safetensors, from h94/IP-Adapter")


def _mixture(layers: dict[str, Tensor], projector: ImageTokens, operations: Any, dtype: torch.dtype) -> ImageMixture:
    """Raises KeyError or RuntimeError for keys without values or of other widths than the tokens."""
    numbers = sorted({int(_LAYER.match(name)[1]) for name in layers})
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
