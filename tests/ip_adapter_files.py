"""IP-Adapter files in the layout of the published ones, of any width, with random weights."""

from __future__ import annotations

import torch


def random_file(
    kind: str, shapes, dim: int, width: int = 48, seed: int = 0, hidden: int = 128
) -> dict[str, torch.Tensor]:
    """Weights named and laid out as in ip-adapter_sd15, -plus_sd15, -full-face_sd15, _sdxl and -plus_sdxl_vit-h.

    shapes: of the cross-attentions in the file's order; dim: of the text; width: of what CLIP vision gives; hidden: of
    the Resampler of -plus.
    """
    random = torch.Generator().manual_seed(seed)

    def matrix(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=random) / size[-1] ** 0.5

    def norm(name: str, size: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": 1 + 0.1 * matrix(size), f"{name}.bias": matrix(size)}

    def linear(name: str, fan_in: int, fan_out: int) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": matrix(fan_out, fan_in), f"{name}.bias": 0.1 * matrix(fan_out)}

    if kind == "base":
        image = linear("proj", width, 4 * dim) | norm("norm", dim)
    elif kind == "full-face":
        image = linear("proj.0", width, width) | linear("proj.2", width, dim) | norm("proj.3", dim)
    else:
        image = {"latents": matrix(1, 16, hidden)} | linear("proj_in", width, hidden)
        image |= linear("proj_out", hidden, dim) | norm("norm_out", dim)
        for layer in range(4):
            name = f"layers.{layer}"
            image |= norm(f"{name}.0.norm1", hidden) | norm(f"{name}.0.norm2", hidden) | norm(f"{name}.1.0", hidden)
            image |= {f"{name}.0.to_q.weight": matrix(hidden, hidden)}
            image |= {f"{name}.0.to_kv.weight": matrix(2 * hidden, hidden)}
            image |= {f"{name}.0.to_out.weight": matrix(hidden, hidden)}
            image |= {f"{name}.1.1.weight": matrix(4 * hidden, hidden)}
            image |= {f"{name}.1.3.weight": matrix(hidden, 4 * hidden)}
    weights = {f"image_proj.{name}": weight for name, weight in image.items()}
    for place, shape in enumerate(shapes):
        for letter in "kv":
            weights[f"ip_adapter.{1 + 2 * place}.to_{letter}_ip.weight"] = 3 * matrix(shape.dim, shape.context_dim)
    return weights
