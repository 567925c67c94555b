"""Deltas on the layers of a network that is somebody else's: by forward hooks, for as long as a sampling run takes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from .deltas import Deltas

Change = Callable[[str, Tensor, Tensor, tuple[int, int]], Tensor]
"""Name of a layer, what entered, what came out, (h, w) -> what is to come out."""
_IN_TRANSFORMER = re.compile(r"\.(transformer_blocks\..*|proj_in|proj_out)$")


def transformer_of(name: str) -> str | None:
    """The name of the module that makes tokens of a picture, for a layer in it that reads such tokens."""
    found = _IN_TRANSFORMER.search(name)
    return name[: found.start()] if found else None


@contextmanager
def deltas_on(
    find: Callable[[str], nn.Module | None], deltas: Deltas, now: Callable[[], Change | None]
) -> Iterator[None]:
    """Hooks on every layer of a U-Net that reads the picture and is changed, until the block ends in whatever way.

    find: the U-Net's layer of a name; None: there is none to be changed. now: what changes at the moment; None:
    nothing. Layers that see other rows or pixels than they should (another node has merged or tiled them) are left to
    the prior.
    """
    sizes: dict[str, tuple[int, int]] = {}

    def note_size(transformer: str):
        def hook(module: nn.Module, args: tuple) -> None:
            sizes[transformer] = tuple(args[0].shape[-2:])

        return hook

    def change(name: str, transformer: str | None):
        def hook(module: nn.Module, args: tuple, out: Tensor) -> Tensor | None:
            changed = now()
            if changed is None:
                return None
            size = tuple(out.shape[-2:]) if out.ndim == 4 else sizes.get(transformer)
            if out.ndim == 3 and (size is None or out.shape[1] != size[0] * size[1]):
                return None
            return changed(name, args[0], out, size)

        return hook

    with ExitStack() as hooks:
        names = deltas.in_the_picture
        for transformer in {transformer_of(name) for name in names} - {None}:
            hooks.callback(find(transformer).register_forward_pre_hook(note_size(transformer)).remove)
        for name in names:
            layer = find(name)
            if layer is not None:
                hooks.callback(layer.register_forward_hook(change(name, transformer_of(name))).remove)
        yield
