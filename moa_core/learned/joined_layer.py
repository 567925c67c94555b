"""A MoA layer for sampling: what the same input goes into is one matrix. The numbers of a MoALayer, in fewer calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .moa import Mixture
from .moa_layer import MixingLayer, Projected


class JoinedLayer(MixingLayer):
    """The router's softmax over two is the sigmoid of their difference."""

    def __init__(
        self, dim: int, context_dim: int | None, heads: int, router_hidden: int, operations: Any = nn, **factory: Any
    ):
        """context_dim: the text's width; None for self-attention."""
        super().__init__()
        self.heads = heads
        self.widths = (router_hidden, dim, dim, dim) if context_dim is None else (router_hidden, dim)
        self.from_h = operations.Linear(dim, sum(self.widths), **factory)
        """The router's hidden layer, q; of self-attention k and v as well."""
        if context_dim is not None:
            self.from_text = operations.Linear(context_dim, 2 * dim, bias=False, **factory)
            """k, v."""
        self.choice = operations.Linear(router_hidden, 1, **factory)
        self.to_out = operations.Linear(dim, dim, **factory)

    def project(self, h: Tensor, context: Tensor | None) -> Projected:
        hidden, q, *keys_values = self.from_h(h).split(self.widths, dim=-1)
        k, v = keys_values or self.from_text(context).chunk(2, dim=-1)
        return Projected(q, k, v, self.choice(nn.functional.silu(hidden)).sigmoid()[..., 0])

    def answer(self, seen: Tensor) -> Tensor:
        return self.to_out(seen)


def joined(mixture: Mixture, operations: Any = nn, **factory: Any) -> Mixture:
    """The same mixture of JoinedLayers. operations, factory (dtype, device): of its own weights."""
    made = Mixture(mixture.config, operations, JoinedLayer, **factory)
    weights = {
        f"layers.{name}.{part}": weight
        for name, layer in mixture.layers.items()
        for part, weight in _joined_weights(layer.state_dict(), name.endswith("attn2")).items()
    }
    prompt = {f"subject_prompt.{name}": weight for name, weight in mixture.subject_prompt.state_dict().items()}
    made.load_state_dict(weights | prompt)
    return made.eval().requires_grad_(False)


def _joined_weights(of: Mapping[str, Tensor], cross: bool) -> dict[str, Tensor]:
    """From the weights of a MoALayer those of a JoinedLayer; cross: of a cross-attention."""
    q, k, v = (of[f"expert.to_{kind}.weight"] for kind in "qkv")
    hidden, bias, choice = of["router.hidden.weight"], of["router.hidden.bias"], of["router.choice.weight"].double()
    from_h = [hidden, q] if cross else [hidden, q, k, v]
    return {
        "from_h.weight": torch.cat(from_h),
        "from_h.bias": torch.cat([bias, bias.new_zeros(sum(map(len, from_h[1:])))]),
        **({"from_text.weight": torch.cat([k, v])} if cross else {}),
        "choice.weight": (choice[1] - choice[0])[None],
        "choice.bias": of["router.choice.bias"].double().diff(),
        "to_out.weight": of["expert.to_out.0.weight"],
        "to_out.bias": of["expert.to_out.0.bias"],
    }
