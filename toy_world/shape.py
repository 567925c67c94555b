"""Shapes of the toy base model, one size for every host: a Stable Diffusion 1.x in miniature."""

BASE = "MoA toy"
IMAGE_SIZE = 192
UNET_CHANNELS = (64, 128)
LAYERS_PER_BLOCK = 1
HEADS = 2

TEXT_ENCODER = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 1,
    "layer_norm_eps": 1e-5,
    "projection_dim": 64,
}
"""A CLIP text model, 64 wide, behind the standard CLIP tokenizer."""

IMAGE_ENCODER = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 8,
    "projection_dim": 64,
}
"""A CLIP vision model for the toy MoA."""
