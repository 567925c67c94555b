"""A ControlNet that attends to something else than the text: to tokens that its conditionings bring for it alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import comfy.conds
from comfy.controlnet import ControlNet
from torch import Tensor, nn


class CONDPictures(comfy.conds.CONDCrossAttn):
    """Tokens [V, T, D], one V for each picture of a whole batch; more pictures than V start over."""

    def of(self, numbers: Sequence[int]) -> comfy.conds.CONDCrossAttn:
        """Of the pictures with these numbers in the whole batch; the host alone takes them by their places."""
        return comfy.conds.CONDCrossAttn(self.cond[[number % len(self.cond) for number in numbers]])


class OwnContext(nn.Module):
    """A ControlNet's network that attends to the input of a name in place of the text, where there is one."""

    def __init__(self, network: nn.Module, name: str):
        super().__init__()
        self.network, self.name = network, name

    @property
    def dtype(self):
        return self.network.dtype

    def forward(self, *, context: Tensor, **inputs: Any) -> Any:
        return self.network(context=inputs.pop(self.name, context), **inputs)


def apply_with_tokens(
    control_net: ControlNet,
    hint: Tensor,
    strength: float,
    percents: tuple[float, float],
    *conditionings: tuple[list, Tensor],
) -> list[list]:
    """Each CONDITIONING with a ControlNet that attends to the tokens [V, T, D] given beside it, one V for each picture.

    It alone does: ControlNets before and after it in a chain go on reading the text. hint: [P, H, W, 3]. The rest is
    as in ComfyUI's Apply ControlNet: conditionings share a ControlNet, so that their rows stay in one batch.
    """
    name = _unused_name([conditioning for conditioning, _ in conditionings])
    controls, applied = {}, []
    for conditioning, tokens in conditionings:
        brought = {name: CONDPictures(tokens)}
        applied.append([])
        for text, own in conditioning:
            before = own.get("control")
            if before not in controls:
                control = _reading(control_net, name).set_cond_hint(hint.movedim(-1, 1), strength, percents)
                controls[before] = control.set_previous_controlnet(before)
            added = {"control": controls[before], "control_apply_to_uncond": False}
            applied[-1].append([text, own | added | {"model_conds": own.get("model_conds", {}) | brought}])
    return applied


def tokens_of_pictures(model_conds: Mapping[str, Any], numbers: Sequence[int]) -> dict[str, Any]:
    """What a conditioning brings, for a run of the pictures with these numbers in the whole batch."""
    return {name: own.of(numbers) if isinstance(own, CONDPictures) else own for name, own in model_conds.items()}


def _reading(control_net: ControlNet, name: str) -> ControlNet:
    """A copy of a ControlNet that attends to what conditionings bring under a name."""
    control = control_net.copy()
    control.control_model = OwnContext(control.control_model, name)
    control.extra_conds = [*control.extra_conds, name]  # what the host hands to the network besides the text
    return control


def _unused_name(conditionings: list[list]) -> str:
    """One under which none of them brings anything; alike in every run: torch.compile would compile anew."""
    return f"moa_tokens_{max(len(own.get('model_conds', {})) for each in conditionings for _, own in each)}"
