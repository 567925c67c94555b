"""A narrow SDXL in the host: the family's own classes, all its transformers, and both of its text encoders."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel
from sdxl import TINY
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from training.host.ldm_names import unet_to_ldm
from training.host.sdxl import TwoTexts

UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": TINY["block_out_channels"][0],
    "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "context_dim": 2048,
    "use_spatial_transformer": True, "use_linear_in_transformer": True,
    "adm_in_channels": 2816, "num_classes": "sequential", "legacy": False, "use_temporal_attention": False,
}  # fmt: skip
SHALLOW = {"num_hidden_layers": 3, "intermediate_size": 64}
"""Of its text encoders."""


def narrow_model(unet: UNet2DConditionModel, dtype: torch.dtype = torch.float32):
    """The MODEL with a narrow U-Net's weights."""
    import comfy.supported_models
    from comfy.model_patcher import CoreModelPatcher

    config = comfy.supported_models.SDXL(dict(UNET))
    config.set_inference_dtype(dtype, None)
    model = config.get_model({})
    weights = {f"model.diffusion_model.{name}": w.clone() for name, w in unet_to_ldm(unet.state_dict(), 2).items()}
    model.load_model_weights(weights, "model.diffusion_model.")
    cpu = torch.device("cpu")
    return CoreModelPatcher(model, load_device=cpu, offload_device=cpu)


def shallow_clip(embeddings: str | None = None):
    """The CLIP: CLIP-L and CLIP-G, as wide as they are and three layers deep, with random weights."""
    import comfy.sd
    import comfy.sdxl_clip
    from comfy.supported_models_base import ClipTarget

    clip = comfy.sd.CLIP(
        ClipTarget(comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel),
        embedding_directory=embeddings,
        model_options={"clip_l_model_config": SHALLOW, "clip_g_model_config": SHALLOW, "dtype": torch.float32},
    )
    random = torch.Generator().manual_seed(5)
    for name, weight in clip.cond_stage_model.named_parameters():
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        weight.copy_(mean + torch.randn(weight.shape, generator=random) / max(weight.shape[-1:], default=1) ** 0.5)
    return clip


def texts_outside(clip) -> TwoTexts:
    """The two text encoders of such a CLIP in transformers."""
    towers = [(CLIPTextModel, "clip_l", "quick_gelu"), (CLIPTextModelWithProjection, "clip_g", "gelu")]
    made, weights = [], clip.cond_stage_model.state_dict()
    for kind, name, activation in towers:
        begin = f"{name}.transformer."
        own = {n.removeprefix(begin).removeprefix("text_model."): w for n, w in weights.items() if n.startswith(begin)}
        width = len(own["final_layer_norm.weight"])
        config = CLIPTextConfig(
            hidden_size=width, projection_dim=width, num_attention_heads=width // 64, hidden_act=activation, **SHALLOW
        )
        made.append(kind(config))
        for outside, weight in made[-1].state_dict().items():
            weight.copy_(own[outside.removeprefix("text_model.")])
    return TwoTexts(*made)
