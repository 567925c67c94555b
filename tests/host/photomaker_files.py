"""PhotoMaker files of version 1 in the layout of the published one, with random weights."""

import torch


def of_comfyui(host) -> dict:
    """The module of ComfyUI's own PhotoMaker nodes."""
    return host.nodes["PhotoMakerLoader"].execute.__func__.__globals__


def random_photomaker(host, unet, seed: int = 0, rank: int = 4) -> dict[str, dict[str, torch.Tensor]]:
    """Laid out as photomaker-v1.bin: CLIP ViT-L with as many layers as ComfyUI's own has, the fusion, a LoRA.

    What float16 can say: ComfyUI's own encoder has it in that.
    """
    random = torch.Generator().manual_seed(seed)
    encoder = {
        name: (
            (1.0 if "norm" in name and name.endswith("weight") else 0.0)
            + torch.randn(weight.shape, generator=random) / max(weight.shape[-1:], default=1) ** 0.5
        )
        .half()
        .float()
        for name, weight in of_comfyui(host)["PhotoMakerIDEncoder"]().state_dict().items()
        if not name.endswith("position_ids")
    }
    lora = {}
    for name in unet.attn_processors:
        attention = unet.get_submodule(name.removesuffix(".processor"))
        for layer in ("q", "k", "v", "out"):
            module = attention.to_out[0] if layer == "out" else attention.get_submodule(f"to_{layer}")
            for half, size in (("down", (rank, module.in_features)), ("up", (module.out_features, rank))):
                weight = 0.5 * torch.randn(size, generator=random) / size[-1] ** 0.5
                lora[f"unet.{name}.to_{layer}_lora.{half}.weight"] = weight
    return {"id_encoder": encoder, "lora_weights": lora}
