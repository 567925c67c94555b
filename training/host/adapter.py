"""MoA on a diffusers U-Net, through its attention processors."""

from __future__ import annotations

from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from moa_core.adapters.image_expert import ImageMixture
from moa_core.adapters.run import ImageCall
from moa_core.address import Address
from moa_core.learned.moa import Mixture
from moa_core.learned.unet_call import BoundTokens, UNetCall
from moa_core.routing.trace import layer_size


class MoAUNet(nn.Module):
    """A diffusers U-Net with a MoA beside every attention layer; call it instead of the U-Net."""

    def __init__(
        self, unet: UNet2DConditionModel, mixture: Mixture | ImageMixture, call_type: type[UNetCall] = UNetCall
    ):
        super().__init__()
        self.unet, self.mixture, self.call_type = unet, mixture, call_type
        self.call: UNetCall | ImageCall | None = None
        """The call under way, kept until the next one: gradient checkpointing comes back to it."""
        self.latent_size = (0, 0)
        """(h, w) of its latents."""
        layers_per_block = unet.config.layers_per_block
        for name, module in unet.named_modules():
            address = Address.from_diffusers(name, layers_per_block)
            if address and isinstance(module, Attention):
                module.set_processor(MoAProcessor(self, address, name.rsplit(".", 1)[-1], module.processor))

    def forward(self, latents: Tensor, timestep: Tensor, context: Tensor, bound: BoundTokens | None = None) -> Tensor:
        """latents [B, 4, h, w], timestep [B], context [B, T, D] -> predicted noise [B, 4, h, w]."""
        return self.run(latents, timestep, context, self.call_type(self.mixture, context, timestep, bound))

    def run(
        self, latents: Tensor, timestep: Tensor, context: Tensor, call: UNetCall | ImageCall | None, **others: Any
    ) -> Tensor:
        """The same with a call that is there already; None runs the prior alone. others: of the U-Net (SDXL's)."""
        self.call, self.latent_size = call, tuple(latents.shape[2:])
        return self.unet(latents, timestep, context, **others).sample


class MoAProcessor:
    """Lets the prior's own processor compute the prior, then mixes."""

    def __init__(self, owner: MoAUNet, address: Address, attention: str, prior: Any):
        self.owner, self.address, self.attention, self.prior = owner, address, attention, prior

    def __call__(self, attn: Attention, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        prior = self.prior(attn, hidden_states, *args, **kwargs)
        if (call := self.owner.call) is None:
            return prior
        size = layer_size(self.owner.latent_size, hidden_states.shape[1])
        return call.mix(self.address, self.attention, hidden_states, prior, size)
