"""IP-Adapter files in the layout of the published ones, of any width, with random weights."""

from __future__ import annotations

import torch

FACES = ("faceid", "faceid-plus", "faceid-plusv2", "portrait")
"""Kinds that read faces; `unnorm` does so as well, in another layout."""
RANK = 8
"""Of the LoRA in a FaceID file; the published ones' is 128."""


def random_file(
    kind: str, shapes, dim: int, width: int = 48, seed: int = 0, hidden: int = 128, rank: int = RANK
) -> dict[str, torch.Tensor]:
    """Weights named and laid out as in ip-adapter_sd15, -plus_sd15, -full-face_sd15, _sdxl and -plus_sdxl_vit-h; and in
    -faceid_sd15, -faceid-plus(v2), -faceid-portrait and -faceid-portrait_sdxl_unnorm.

    shapes: of the cross-attentions in the file's order; dim: of the text; width: of what CLIP vision gives; hidden: of
    the Resampler of -plus; rank: of a FaceID file's LoRA.
    """
    random = torch.Generator().manual_seed(seed)

    def matrix(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=random) / size[-1] ** 0.5

    def norm(name: str, size: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": 1 + 0.1 * matrix(size), f"{name}.bias": matrix(size)}

    def linear(name: str, fan_in: int, fan_out: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": matrix(fan_out, fan_in), f"{name}.bias": 0.1 * matrix(fan_out)}

    def reading(place: str, hidden: int, feed_forward: int) -> dict[str, torch.Tensor]:
        made = linear(f"{place}proj_in", 512 if kind == "unnorm" else width, hidden)
        made |= linear(f"{place}proj_out", hidden, dim) | norm(f"{place}norm_out", dim)
        for layer in range(4):
            name = f"{place}layers.{layer}"
            made |= norm(f"{name}.0.norm1", hidden) | norm(f"{name}.0.norm2", hidden) | norm(f"{name}.1.0", hidden)
            made |= {f"{name}.0.to_q.weight": matrix(hidden, hidden)}
            made |= {f"{name}.0.to_kv.weight": matrix(2 * hidden, hidden)}
            made |= {f"{name}.0.to_out.weight": matrix(hidden, hidden)}
            made |= {f"{name}.1.1.weight": matrix(feed_forward, hidden)}
            made |= {f"{name}.1.3.weight": matrix(hidden, feed_forward)}
        return made

    if kind == "base":
        image = linear("proj", width, 4 * dim) | norm("norm", dim)
    elif kind == "full-face":
        image = linear("proj.0", width, width) | linear("proj.2", width, dim) | norm("proj.3", dim)
    elif kind in FACES:
        count = 16 if kind == "portrait" else 4
        image = linear("proj.0", 512, 1024) | linear("proj.2", 1024, count * dim) | norm("norm", dim)
        image |= reading("perceiver_resampler.", dim, 4 * dim) if "plus" in kind else {}
    else:
        image = {"latents": matrix(1, 16, hidden)} | reading("", hidden, 4 * hidden)
    weights = {f"image_proj.{name}": weight for name, weight in image.items()}
    for place, shape in enumerate(shapes):
        for letter in "kv":
            weights[f"ip_adapter.{1 + 2 * place}.to_{letter}_ip.weight"] = 3 * matrix(shape.dim, shape.context_dim)
    if kind in FACES and kind != "portrait":
        for place, shape in enumerate(shapes):
            for crosses in range(2):
                for layer, read in (("q", 0), ("k", crosses), ("v", crosses), ("out", 0)):
                    down = matrix(rank, shape.context_dim if read else shape.dim)
                    for half, weight in (("down", down), ("up", 0.5 * matrix(shape.dim, rank))):
                        name = f"ip_adapter.{2 * place + crosses}.to_{layer}_lora.{half}.weight"
                        weights[name] = weight
    return weights
