"""Low-rank updates of a frozen network's layers (Hu et al., 2021), by peft."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

ADAPTER = "default"
Network = TypeVar("Network", bound=nn.Module)


def with_low_rank(network: Network, rank: int, wanted: Callable[[str], bool]) -> Network:
    """The network with updates that begin as nothing in the linear and convolution layers wanted by name.

    All else of it is frozen. No layer's name may end with another's whole name.
    """
    names = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=[name for name in names if wanted(name)])
    return inject_adapter_in_model(config, network, ADAPTER)


def low_rank_updates(network: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Every updated layer's name, and the two factors up [out, r, ...] and down [r, in, ...] of what is added to it."""
    for name, layer in network.named_modules():
        if hasattr(layer, "lora_A"):
            yield name, layer.lora_B[ADAPTER].weight, layer.lora_A[ADAPTER].weight
