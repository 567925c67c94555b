"""The toy world's pose ControlNet (Zhang et al., 2023), as a Control-LoRA: low-rank updates of the U-Net's encoder.

The update, the layers that read the pose and those that hand over to the U-Net are all there is in the file; the rest
is the checkpoint's, which ComfyUI's Load ControlNet Model fills in.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import ControlNetModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moa_core.files.whole_file import whole
from toy_world.draw import draw_pose, draw_scene
from toy_world.shape import IMAGE_SIZE, LAYERS_PER_BLOCK
from toy_world.world import PLACES, Scene
from training.host.base import Base
from training.host.ldm_names import unet_to_ldm
from training.toy.pretrain.loop import Plan, base_of, plain_attention
from training.toy.pretrain.low_rank import low_rank_updates, with_low_rank
from training.toy.pretrain.on_base import Scenes, train_on_base
from training.toy.pretrain.scenes import rendered

RANK = 16
DROPPED = 0.5
"""Share of empty captions, so that the pose is looked at even where words say the same (ControlNet's own share)."""
FILE = "moa-toy-pose.safetensors"
PROMPTS = [f"a {word} {place}" for word in ("man", "woman") for place in PLACES.values()]


class PosedDenoiser(nn.Module):
    """Base model and ControlNet as one model."""

    def __init__(self, base: Base):
        super().__init__()
        self.unet, self.text_encoder = base.unet, base.text_encoder
        self.control = fresh_controlnet(base)
        plain_attention(self.unet, self.control)
        self.to(memory_format=torch.channels_last)

    def forward(self, latents: Tensor, timestep: Tensor, ids: Tensor, poses: Tensor) -> Tensor:
        """latents [B, 4, h, w], timestep [B], ids [B, 77], poses [B, 3, 8h, 8w] in 0..1 -> noise [B, 4, h, w]."""
        context = self.text_encoder(ids).last_hidden_state
        down, middle = self.control(latents, timestep, context, poses, return_dict=False)
        return self.unet(
            latents,
            timestep,
            context,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        ).sample


def fresh_controlnet(base: Base) -> ControlNetModel:
    """One that changes nothing yet."""
    control = ControlNetModel.from_unet(base.unet)
    # conv_in keeps the base's weights: peft would take the layer of that name which reads the pose as well.
    control = with_low_rank(control, RANK, lambda name: not name.startswith("controlnet_") and name != "conv_in")
    for part in (control.controlnet_cond_embedding, control.controlnet_down_blocks, control.controlnet_mid_block):
        part.requires_grad_(True)
    return control


def picture_and_pose(scene: Scene, size: int) -> np.ndarray:
    """[size, size, 6]."""
    return np.concatenate([draw_scene(scene, size)[0], draw_pose(scene, size)], axis=2)


def train_controlnet(plan: Plan) -> None:
    """Train a pose ControlNet on the base model, and write it as a Control-LoRA."""
    base, pictures = base_of(plan), rendered(plan, IMAGE_SIZE, picture_and_pose)
    pixels = torch.from_numpy(np.array(pictures.pixels))
    torch.manual_seed(plan.seed)
    scenes = Scenes.of(base, pixels[..., :3], pictures.captions, pixels[..., 3:])
    model = PosedDenoiser(base)
    train_on_base(plan, "controlnet", base, model, scenes, DROPPED, PROMPTS)
    save_control_lora(model.control, plan.run / FILE)


def save_control_lora(control: ControlNetModel, path: Path) -> None:
    """As ComfyUI reads it, in float16; whole or not at all."""
    weights = _named(control) | {"lora_controlnet": torch.zeros(0)}
    with whole(path) as unfinished:
        save_file({k: v.detach().cpu().half().contiguous() for k, v in weights.items()}, unfinished, {"format": "pt"})


def load_control_lora(base: Base, path: Path) -> ControlNetModel:
    """What `save_control_lora` wrote, on the base model it was trained on."""
    control, stored = fresh_controlnet(base).eval(), load_file(path)
    for name, own in _named(control).items():
        own.data.copy_(stored[name])
    return control


def _named(control: ControlNetModel) -> dict[str, Tensor]:
    """What is trained of it, by the names of a Control-LoRA's file; the tensors are the model's own."""
    weights = {}
    for name, up, down in low_rank_updates(control):
        (name,) = unet_to_ldm({f"{name}.weight": up}, LAYERS_PER_BLOCK)
        weights[name.replace(".weight", ".up")], weights[name.replace(".weight", ".down")] = up, down
    last = 2 * len(control.controlnet_cond_embedding.blocks) + 2
    for name, weight in control.state_dict().items():
        part, _, rest = name.partition(".")
        if part == "controlnet_cond_embedding":
            layer, kind = rest.rsplit(".", 1)
            ends = {"conv_in": 0, "conv_out": last}
            place = ends[layer] if layer in ends else 2 * int(layer.rsplit(".", 1)[-1]) + 2
            weights[f"input_hint_block.{place}.{kind}"] = weight
        elif part == "controlnet_down_blocks":
            number, kind = rest.split(".")
            weights[f"zero_convs.{number}.0.{kind}"] = weight
        elif part == "controlnet_mid_block":
            weights[f"middle_block_out.0.{rest}"] = weight
    return weights
