"""The toy family: a small SD-shaped base model that CheckpointLoaderSimple loads like any other."""

import comfy.latent_formats
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base

from ...toy_world import shape


class ToyTokenizer(comfy.sd1_clip.SDTokenizer):
    """The standard CLIP tokenizer; only its textual inversions are narrower."""

    def __init__(self, embedding_directory=None, tokenizer_data={}):  # noqa: B006 (the host's signature)
        super().__init__(
            embedding_directory=embedding_directory,
            embedding_size=shape.TEXT_ENCODER["hidden_size"],
            tokenizer_data=tokenizer_data,
        )


class ToySD1Tokenizer(comfy.sd1_clip.SD1Tokenizer):
    def __init__(self, embedding_directory=None, tokenizer_data={}):  # noqa: B006
        super().__init__(embedding_directory, tokenizer_data, tokenizer=ToyTokenizer)


class ToyClipModel(comfy.sd1_clip.SDClipModel):
    def __init__(self, device="cpu", dtype=None, model_options={}):  # noqa: B006
        super().__init__(
            device=device,
            dtype=dtype,
            model_options=model_options,
            textmodel_json_config=dict(shape.TEXT_ENCODER),
            return_projected_pooled=False,
        )


class ToySD1ClipModel(comfy.sd1_clip.SD1ClipModel):
    def __init__(self, device="cpu", dtype=None, model_options={}):  # noqa: B006
        super().__init__(device=device, dtype=dtype, model_options=model_options, clip_model=ToyClipModel)


class ToyLatents(comfy.latent_formats.LatentFormat):
    """The toy autoencoder's latents are already of the diffusion model's scale."""

    scale_factor = 1.0
    # What previews show while sampling; fitted to the shipped autoencoder by `python -m training.toy latent-rgb`.
    latent_rgb_factors = [
        [-0.1461, 0.0754, 0.2633],
        [-0.2249, -0.0071, 0.2084],
        [-0.2372, -0.3084, -0.2689],
        [-0.1243, -0.1124, -0.0713],
    ]
    latent_rgb_factors_bias = [0.2827, 0.1873, 0.1562]


class MoAToy(comfy.supported_models.SD15):
    unet_config = comfy.supported_models.SD15.unet_config | {
        "context_dim": shape.TEXT_ENCODER["hidden_size"],
        "model_channels": shape.UNET_CHANNELS[0],
    }
    unet_extra_config = {"num_heads": shape.HEADS, "num_head_channels": -1}
    latent_format = ToyLatents

    def clip_target(self, state_dict={}):  # noqa: B006
        return comfy.supported_models_base.ClipTarget(ToySD1Tokenizer, ToySD1ClipModel)


def register_toy_family() -> None:
    """Let the host recognise toy checkpoints: the one thing of the host that importing the pack adds to."""
    known = comfy.supported_models.models
    if not any(family.__name__ == MoAToy.__name__ for family in known):
        known.append(MoAToy)
