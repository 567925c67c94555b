"""MOAs of random IP-Adapter files in the host, and graphs with them."""

import json

import torch
from ip_adapter_files import random_file
from safetensors.torch import save_file

VISION = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 2, "projection_dim": 48, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "num_channels": 3,
    "model_type": "clip_vision_model",
}  # fmt: skip
PROMPT = "a man and a woman in paris"


def vision(folder, **changes):
    """A small CLIP_VISION with random weights."""
    import comfy.clip_vision

    (folder / "vision.json").write_text(json.dumps(VISION | changes))
    model = comfy.clip_vision.ClipVisionModel(str(folder / "vision.json"))
    random = torch.Generator().manual_seed(3)
    for name, weight in model.model.named_parameters():
        mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        weight.copy_(mean + torch.randn(weight.shape, generator=random) / max(weight.shape[-1], 2) ** 0.5)
    return model


def adapter(host, unet, tmp_path, kind: str, name: str | None = None, **changes):
    """MOA of a random file made for a U-Net of diffusers."""
    from moa_core.adapters.image_expert import file_order
    from moa_core.address import block_shapes

    blocks, width = block_shapes(unet.state_dict()), unet.config.cross_attention_dim
    folder = host.base / "models/ipadapter"
    folder.mkdir(exist_ok=True)
    weights = random_file(kind, [blocks[a] for a in file_order(blocks)], width)
    save_file(weights, folder / f"{name or kind}.safetensors")
    return host.run("MoAFromIPAdapter", f"{name or kind}.safetensors", vision(tmp_path, **changes))[0]


def patched(host, loaded, moa, *words: str, prompt: str = PROMPT, widgets=None, **subject):
    """The patched MODEL, a prompt and a negative one of its CLIP."""
    people = [host.run("MoASubjectEncoder", moa, picture(seed), word, **subject)[0] for seed, word in enumerate(words)]
    model, clip = host.patch(loaded[0], loaded[1], moa, *people, **(widgets or {}))
    return model, host.prompt(clip, prompt), host.prompt(clip, "ugly")


def picture(seed: int = 0):
    return torch.rand(1, 60, 80, 3, generator=torch.Generator().manual_seed(seed))


def face_adapter(host, unet, folder, kind: str, name: str, finder=None):
    """MOA of a random FaceID file, a pickle as the published ones are; finder: on the insightface socket."""
    from face_pictures import FaceFinder

    from moa_core.adapters.image_expert import file_order
    from moa_core.address import block_shapes

    blocks, width = block_shapes(unet.state_dict()), unet.config.cross_attention_dim
    parts = {"image_proj": {}, "ip_adapter": {}}
    for full, weight in random_file(kind, [blocks[a] for a in file_order(blocks)], width).items():
        part, own = full.split(".", 1)
        parts[part][own] = weight
    (host.base / "models/ipadapter").mkdir(exist_ok=True)
    torch.save(parts, host.base / f"models/ipadapter/{name}.bin")
    seeing = vision(folder) if "plus" in kind else None
    return host.run("MoAFromIPAdapter", f"{name}.bin", seeing, finder or FaceFinder())[0]
