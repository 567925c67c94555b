"""Fixtures of the host tests: a ComfyUI in this process, with toy models."""

from __future__ import annotations

import pytest
import torch
from comfy_host import Host, start_host
from image_experts import adapter
from lora_files import random_lora
from narrow_sdxl import narrow_model, shallow_clip
from safetensors.torch import save_file
from sdxl import TINY, sdxl_unet
from toy_models import SHIPPED, shipped

from training.comfyui import Server, find_comfyui, make_base_directory


@pytest.fixture(scope="session")
def host(tmp_path_factory, toy_base, stirred_moa) -> Host:
    from moa_core.learned.moa_file import save_moa
    from toy_world.shape import IMAGE_ENCODER
    from training.host.toy_base import save_toy

    base = make_base_directory(tmp_path_factory.mktemp("comfyui"))
    save_toy(toy_base, base / "models/checkpoints/toy.safetensors", torch.float32)
    save_moa(stirred_moa, base / "models/moa/moa-stirred.safetensors", torch.float32)
    save_moa(toy_base.fresh_moa(IMAGE_ENCODER), base / "models/moa/moa-fresh.safetensors", torch.float32)

    started = start_host(base)
    torch.backends.cudnn.allow_tf32 = False  # on a GPU convolutions of float32 would be compared to three digits
    return started


@pytest.fixture(scope="module")
def fresh_server(tmp_path_factory, request):
    """A ComfyUI server with the pack and nothing else; while the pack has no toy models, with untrained ones."""
    base = make_base_directory(tmp_path_factory.mktemp("fresh"))
    if not shipped():
        from moa_core.learned.moa_file import save_moa

        checkpoint, moa = (base / "models" / path for path in SHIPPED)
        with torch.inference_mode(False):
            request.getfixturevalue("toy_base").save(checkpoint)
            save_moa(request.getfixturevalue("stirred_moa"), moa)
    with Server(find_comfyui(), base) as running:
        yield running


@pytest.fixture(autouse=True)
def inference():
    """The host runs nodes in inference mode; so do the tests."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def loaded(host):
    """MODEL, CLIP, VAE of the toy checkpoint."""
    with torch.inference_mode():
        return host.run("CheckpointLoaderSimple", "toy.safetensors")


@pytest.fixture(scope="session")
def sdxl(host):
    """A narrow SDXL: its U-Net in diffusers, and (MODEL, CLIP)."""
    torch.manual_seed(0)
    with torch.inference_mode(False):
        unet = sdxl_unet(**TINY)
    with torch.inference_mode():
        return unet, (narrow_model(unet), shallow_clip())


@pytest.fixture(scope="session")
def moa(host, loaded):
    with torch.inference_mode():
        return host.run("MoALoader", "moa-stirred.safetensors")[0]


@pytest.fixture(scope="session")
def fresh(host, loaded):
    with torch.inference_mode():
        return host.run("MoALoader", "moa-fresh.safetensors")[0]


@pytest.fixture(scope="session")
def ip_moa(host, toy_base, tmp_path_factory):
    """Image experts, of a random IP-Adapter file."""
    with torch.inference_mode():
        return adapter(host, toy_base.unet, tmp_path_factory.mktemp("vision"), "plus", "any")


@pytest.fixture(scope="session")
def loras(host, loaded):
    """LoRA files of the toy U-Net with random weights, random-<seed>; LoRA subjects need no MOA."""
    with torch.inference_mode():
        for seed in range(4):
            save_file(random_lora(*loaded[:2], seed), host.base / f"models/loras/random-{seed}.safetensors")


@pytest.fixture(scope="session", params=["moa", "ip_moa", "loras"])
def each_moa(request):
    """Every kind of expert: a MOA of learned ones, one of image experts, none for LoRAs."""
    return request.getfixturevalue(request.param)
