"""Names of a U-Net's weights in diffusers and in LDM checkpoints, for SD 1.x and SDXL shapes of any size."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_to_ldm(weights: Mapping[str, Tensor], layers_per_block: int) -> dict[str, Tensor]:
    """A diffusers U-Net's weights under LDM names (without a checkpoint's prefix).

    Raises KeyError for a name that an SD 1.x or SDXL U-Net does not have.
    """
    attended = {name.split(".")[1] for name in weights if re.match(r"up_blocks\.\d+\.attentions", name)}
    return {_name_to_ldm(name, layers_per_block + 1, attended): weight for name, weight in weights.items()}


def _name_to_ldm(name: str, per_level: int, attended: set[str]) -> str:
    """One weight's name; per_level: LDM blocks of one level; attended: decoder levels that have attention."""
    module, kind = name.rsplit(".", 1)
    if module in _ENDS:
        return f"{_ENDS[module]}.{kind}"
    if match := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", name):
        block = int(match[2]) * per_level + int(match[4])
        place = f"input_blocks.{block + 1}" if match[1] == "down" else f"output_blocks.{block}"
        return f"{place}.{_part(match[3], match[5])}"
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name):
        number = 1 if match[1] == "attentions" else 2 * int(match[2])
        return f"middle_block.{number}.{_part(match[1], match[3]).split('.', 1)[1]}"
    if match := re.match(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.*)", name):
        return f"input_blocks.{(int(match[1]) + 1) * per_level}.0.op.{match[2]}"
    if match := re.match(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.*)", name):
        after = 2 if match[1] in attended else 1
        return f"output_blocks.{(int(match[1]) + 1) * per_level - 1}.{after}.conv.{match[2]}"
    raise KeyError(name)


def _part(part: str, rest: str) -> str:
    """`0.<resnet's name>` or `1.<attention's name>` within one LDM block."""
    if part == "attentions":
        return f"1.{rest}"
    module, kind = rest.rsplit(".", 1)
    return f"0.{_RESNET[module]}.{kind}"
