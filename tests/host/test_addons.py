"""The toy world's ControlNet and LoRA: what ComfyUI makes of their files is what was trained in diffusers."""

import pytest
import torch
from test_parity import calls

NOISE = 0.2
PROMPT = "a man waving on a beach"
TIMESTEPS = torch.tensor([800.0, 300.0])


@pytest.fixture
def base(host):
    return read_base(host)


def read_base(host):
    """The checkpoint of the host's tests, as training reads it."""
    from training.host.toy_base import load_toy

    with torch.inference_mode(False):
        return load_toy(host.base / "models/checkpoints/toy.safetensors")


@pytest.fixture
def inputs():
    return torch.randn(2, 2, 4, 16, 16, generator=torch.Generator().manual_seed(5))


class HostsText(torch.nn.Module):
    """The host's own text embedding in the text encoder's place: on a CPU the host rounds that to float16."""

    def __init__(self, conditioning):
        super().__init__()
        self.last_hidden_state = conditioning[0][0].expand(2, -1, -1)

    def forward(self, ids):
        return self


def train(model):
    """As training would leave it: no part that learns is what it began as, and all of it fits into float16."""
    random = torch.Generator().manual_seed(6)
    for parameter in model.parameters():
        if parameter.requires_grad:
            stirred = parameter + NOISE * torch.randn(parameter.shape, generator=random) / parameter[0].numel() ** 0.5
            parameter.data = stirred.half().float()


def predicted(host, model, conditioning, inputs):
    sigmas = model.get_model_object("model_sampling").sigma(TIMESTEPS)
    return calls(model, conditioning, inputs, sigmas)


def folder(host, kind: str):
    path = host.base / "models" / kind
    path.mkdir(exist_ok=True)
    return path


def test_the_pose_controlnet_is_the_same_in_both_hosts(host, loaded, base, inputs):
    from training.toy.pretrain.controlnet import PosedDenoiser, load_control_lora, save_control_lora

    with torch.inference_mode(False):
        model = PosedDenoiser(base).eval()
        train(model)
    path = folder(host, "controlnet") / "pose.safetensors"
    save_control_lora(model.control, path)
    with torch.inference_mode(False):
        model.control = load_control_lora(base, path)
    pose = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(7))
    prompt = host.prompt(loaded[1], PROMPT)
    control = host.run("ControlNetLoader", "pose.safetensors")[0]
    posed, _ = host.run("ControlNetApplyAdvanced", prompt, prompt, control, pose, 1.0, 0.0, 1.0)
    theirs = predicted(host, loaded[0], posed, inputs)
    plain = predicted(host, loaded[0], prompt, inputs)

    model.text_encoder, hint = HostsText(prompt), pose.movedim(-1, 1).expand(2, -1, -1, -1)
    for x, timestep, their, prior in zip(inputs, TIMESTEPS, theirs, plain, strict=True):
        ours = model(x, timestep.expand(2), None, hint)
        assert (ours - prior).abs().max() > 1e-2
        assert (ours - their).abs().max() < 1e-4


def test_the_style_lora_is_the_same_in_both_hosts(host, loaded, base, inputs):
    from training.host.lora import read_lora, write_into
    from training.toy.pretrain import style_lora
    from training.toy.pretrain.lora import LoRADenoiser, save_lora

    with torch.inference_mode(False):
        model = LoRADenoiser(base, style_lora.RANK, style_lora.LAYERS).eval()
        train(model)
    path = folder(host, "loras") / "style.safetensors"
    save_lora(model.unet, path)
    assert path.stat().st_size <= 300_000
    prompt = host.prompt(loaded[1], PROMPT)
    styled = host.run("LoraLoaderModelOnly", loaded[0], "style.safetensors", 1.0)[0]
    theirs, plain = predicted(host, styled, prompt, inputs), predicted(host, loaded[0], prompt, inputs)
    with torch.inference_mode(False):
        model.unet = read_base(host).unet
        write_into(model.unet, read_lora(model.unet, path))
    model.text_encoder = HostsText(prompt)
    for x, timestep, their, prior in zip(inputs, TIMESTEPS, theirs, plain, strict=True):
        ours = model(x, timestep.expand(2), None)
        assert (ours - prior).abs().max() > 1e-2
        assert (ours - their).abs().max() < 1e-4
