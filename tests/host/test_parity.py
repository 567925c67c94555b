"""The same weights, noise and prompt give the same U-Net output in ComfyUI and in diffusers."""

import copy
import gc

import pytest
import torch
from conftest import stir

WIDTHS = {"sd15, narrow above": (320, 320, 640, 640), "sd15": (320, 640, 1280, 1280)}
SD15 = {
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
TINY_ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
    "projection_dim": 768,
}


def calls(model, positive, inputs, sigmas):
    """The noise that the host's model predicts for each input at its sigma in one run of its sampling, cfg 1."""
    import comfy.samplers

    class Given(comfy.samplers.Sampler):
        def sample(self, denoiser, *args, **kwargs):
            device, extra_args = args[0].device, args[1]
            scaled = [x * (sigma**2 + 1) ** 0.5 for x, sigma in zip(inputs, sigmas, strict=True)]
            self.predicted = [
                (x - denoiser(x.to(device), sigma.to(device).expand(len(x)), **extra_args).cpu()) / sigma
                for x, sigma in zip(scaled, sigmas, strict=True)
            ]
            return scaled[-1].to(device)

    given = Given()
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, positive)
    guider.set_cfg(1.0)
    nothing = torch.zeros_like(inputs[0])
    guider.sample(nothing, nothing, given, torch.cat([sigmas, sigmas[-1:] * 0]), seed=0)
    return given.predicted


@pytest.mark.parametrize("shape", ["toy", "sd15, narrow above", pytest.param("sd15", marks=pytest.mark.slow)])
def test_comfyui_and_diffusers_agree(host, toy_base, shape):
    import comfy.ops
    import comfy.sd
    from comfy.model_patcher import ModelPatcher
    from diffusers import UNet2DConditionModel

    from moa_core.learned.moa import MoA, MoAConfig
    from moa_core.learned.unet_call import BoundTokens, UNetCall
    from moa_core.routing.subject_area import SubjectArea, opening_end
    from moa_core.subjects.subject import Subject
    from moa_core.subjects.view import View
    from toy_world.shape import IMAGE_ENCODER
    from training.host.adapter import MoAUNet
    from training.host.ldm_names import unet_to_ldm

    torch.manual_seed(0)
    with torch.inference_mode(False):
        unet = copy.deepcopy(toy_base.unet)
        if shape != "toy":
            unet = UNet2DConditionModel(block_out_channels=WIDTHS[shape], **SD15).eval()
        if shape == "toy":
            fresh = toy_base.fresh_moa(IMAGE_ENCODER)
        else:
            config = MoAConfig.for_unet(unet.state_dict(), image_encoder=TINY_ENCODER)
            assert len(config.blocks) == 16
            fresh = MoA.from_prior(unet.state_dict(), config)
        moa = stir(fresh)
    width = moa.config.text_dim
    size, batch = (16, 2) if shape == "toy" else (24, 1)
    timesteps = torch.tensor([700.0, 500.0, 300.0] if shape == "toy" else [700.0, 300.0])
    inputs, context = torch.randn(len(timesteps), batch, 4, size, size), torch.randn(1, 77, width)
    subject = Subject(torch.randn(batch, moa.config.feature_dim), "man", "man")

    # ComfyUI: the same U-Net under LDM names, the same MoA through MoA Patch Model's own hooks.
    names = unet_to_ldm(unet.state_dict(), unet.config.layers_per_block)
    weights = {f"model.diffusion_model.{name}": weight.clone() for name, weight in names.items()}
    model = comfy.sd.load_diffusion_model_state_dict(weights, {"dtype": torch.float32})
    host_moa_class, hooks = host.module("moa_core.learned.moa").MoA, host.module("nodes.sampling.sampling_run")
    host_config = host.module("moa_core.learned.moa").MoAConfig.from_json(moa.config.to_json())
    host_moa = host_moa_class(host_config, comfy.ops.manual_cast)
    host_moa.load_state_dict(moa.state_dict())
    mixture = ModelPatcher(host_moa.mixture, model.load_device, torch.device("cpu"))
    binding = host.module("moa_core.subjects.binding")
    note = binding.BoundPrompt("a man", (binding.Binding(5, subject), binding.Binding(60, subject)))
    conditioning = [[context, {"moa_bound_prompt": note}]]
    sigmas = model.get_model_object("model_sampling").sigma(timesteps)

    # diffusers: the prior first, then the same module with its attention processors wrapped.
    rows = BoundTokens.stack([(row, position, subject.feature(row)) for row in range(batch) for position in (5, 60)])
    contexts = context.expand(batch, -1, -1)
    prior = unet(inputs[-1], timesteps[-1].expand(batch), contexts).sample
    diffusers_unet = MoAUNet(unet, moa.mixture)
    views = [View(picture) for picture in range(batch)]

    last = {}
    for sparse in (False, True):
        patched = model.clone()
        hooks.MoAHooks([subject], sparse=sparse, learned=host_moa.mixture).attach(patched, mixture)
        ours = calls(patched, conditioning, inputs, sigmas)
        area = SubjectArea(batch, (size, size), opening_end(timesteps[0].item()), moa.config.blocks) if sparse else None
        for x, timestep, our in zip(inputs, timesteps, ours, strict=True):
            where = area and area.at(float(timestep), views, x)
            call = UNetCall(moa.mixture, contexts, timestep.expand(batch), rows, area=where)
            theirs = diffusers_unet.run(x, timestep.expand(batch), contexts, call)
            if area:
                area.add(call.wanted, dict(enumerate(views)), x)
            difference = (our - theirs).abs().max().item()
            print(f"{shape} {'sparse' if sparse else 'dense'} at {timestep:.0f}: max abs difference {difference:.1e}")
            assert difference < 1e-4
        assert (theirs - prior).abs().max() > 1e-2  # the MoA acts
        last[sparse] = theirs
    assert (last[True] - last[False]).abs().max() > 1e-2  # and the area cuts
    del model, patched, weights, host_moa, moa, fresh
    gc.collect()
