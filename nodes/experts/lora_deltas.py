"""The LoRAs of several subjects as deltas of a MODEL's layers."""

from __future__ import annotations

from collections.abc import Sequence

import comfy.lora
import comfy.ops
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter import LoRAAdapter
from torch import Tensor, nn

from ...moa_core.adapters.deltas import Change, Deltas, Difference, LowRank, deltas_of
from ...moa_core.adapters.layer_hooks import transformer_of
from ...moa_core.address import Address
from ..host.attention_layers import unet_blocks
from ..host.messages import Message
from .loaded_ip_adapter import LoadedIPAdapter
from .lora_file import LoRAFile

UNET = "diffusion_model."
PLACELESS = ("time_embed.", "label_emb.", "emb_layers.")
"""Parts of the names of layers that say something of the whole picture, and nothing of a place in it."""


def build_deltas(
    model: ModelPatcher, clip: comfy.sd.CLIP | None, sources: Sequence[LoRAFile | LoadedIPAdapter]
) -> tuple[Deltas, list[Message]]:
    """Of LoRA files, and of FaceID files that hold one: the n-th is the n-th part; and what is to be said of them.

    Raises ValueError for a file that is for another family.
    """
    files, messages = [], []
    for source in sources:
        if isinstance(source, LoadedIPAdapter):
            files.append(source.adapter.changes_of(unet_blocks(model), Address.to_ldm, _dtype(model)))
            continue
        patches = source.model_patches(model, clip)
        if not patches and not (clip and source.clip_patches(clip)):
            found = f"its {len(source.weights)} weights fit none of its layers"
            raise ValueError(_for_another_family(model, source, found))
        changes, left_out = _changes(model, source, patches)
        files.append(changes)
        if left_out:
            messages.append(_left_out(source, left_out))
    return deltas_of(model.model.diffusion_model, files, comfy.ops.manual_cast), messages


def _dtype(model: ModelPatcher) -> torch.dtype:
    return model.model.manual_cast_dtype or model.model_dtype()


def _changes(model: ModelPatcher, file: LoRAFile, patches: dict) -> tuple[dict[str, Change], list[str]]:
    """What a file changes, by the layer's name within the U-Net, and the names of what has no place in a picture."""
    unet, changes, left_out = model.model.diffusion_model, {}, []
    for key, patch in patches.items():
        name, _, kind = ("" if isinstance(key, tuple) else key.removeprefix(UNET)).rpartition(".")
        layer = unet.get_submodule(name) if name else None
        if not _has_a_place(name, layer) or kind not in ("weight", "bias"):
            left_out.append(str(key))
        elif file.strength:
            change = _change(model, file, key, patch)
            if change is None:  # the host itself makes nothing of it, and has logged why
                left_out.append(str(key))
            else:
                changes[name] = _joined(changes.get(name), change)
    return changes, left_out


def _has_a_place(name: str, layer: nn.Module | None) -> bool:
    if any(part in f"{name}." for part in PLACELESS):
        return False
    return isinstance(layer, nn.Conv2d) or (isinstance(layer, nn.Linear) and transformer_of(name) is not None)


def _change(model: ModelPatcher, file: LoRAFile, key: str, patch) -> Change | None:
    """Two thin matrices where the file has them; else the difference that the host's own calculation makes.

    Raises ValueError for matrices of another family's layers.
    """
    shape, dtype = model.get_model_object(key).shape, _dtype(model)
    if isinstance(patch, LoRAAdapter) and all(other is None for other in patch.weights[3:]):
        up, down, alpha = patch.weights[:3]
        if (len(up), down[0].numel()) != (shape[0], shape[1:].numel()):
            there, here = f"{len(up)}x{down[0].numel()}", f"{shape[0]}x{shape[1:].numel()}"
            found = f"{key.removeprefix(UNET)} is for {there}, and here {here}"
            raise ValueError(_for_another_family(model, file, found))
        scale = file.strength * (1.0 if alpha is None else alpha / len(down))
        return LowRank((up.flatten(1).float() * scale).to(dtype), down.to(dtype).reshape(len(down), *shape[1:]))
    before = _own_weight(model, key)
    after = comfy.lora.calculate_weight([(file.strength, patch, 1.0, None, None)], before.clone(), key)
    change = (after - before).to(dtype)
    if not bool(change.any()):
        return None
    return Difference(None, change) if key.endswith(".bias") else Difference(change)


def _for_another_family(model: ModelPatcher, file: LoRAFile, found: str) -> str:
    family = type(model.model.model_config).__name__
    return (
        f"MoA Patch Model: the LoRA '{file.name}' is for another family than this {family} MODEL: {found}. Load a "
        "checkpoint of the family it was trained on, or choose another LoRA in LoRA Subject"
    )


def _own_weight(model: ModelPatcher, key: str) -> Tensor:
    """The checkpoint's, without what other nodes patch, in float32 on the CPU."""
    weight, convert = model.get_key_patches(key)[key][0]
    layer = model.model.get_submodule(key.rpartition(".")[0])
    if hasattr(layer, "get_weight"):  # ComfyUI-GGUF's: the weight is quantized bytes, and its clone is itself
        return torch.Tensor(layer.get_weight(weight, torch.float32)).cpu().clone()
    return convert(weight.detach().clone(), inplace=True).to("cpu", torch.float32)


def _joined(known: Change | None, more: Change) -> Change:
    """A layer's weight and bias are changed by one."""
    if known is None:
        return more
    low = next((change for change in (known, more) if isinstance(change, LowRank)), None)
    both = [change for change in (known, more) if isinstance(change, Difference)]
    weight = next((change.weight for change in both if change.weight is not None), None)
    bias = next((change.bias for change in both if change.bias is not None), None)
    return Difference(
        weight if low is None else (low.up @ low.down.flatten(1)).view(len(low.up), *low.down.shape[1:]), bias
    )


def _left_out(file: LoRAFile, names: list[str]) -> Message:
    return Message(
        f"'{file.name}': {len(names)} of its changes are left out.",
        f"Time embeddings and norms have no place in the picture, so they cannot act on one person alone ({names[0]}, "
        "for one). The rest of the file acts.",
    )
