"""MoA on a diffusers U-Net, through its attention processors."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from moa_core.adapters.layer_hooks import deltas_on
from moa_core.address import Address
from moa_core.attention import attend
from moa_core.learned.moa import Mixture
from moa_core.learned.unet_call import BoundTokens, UNetCall
from moa_core.routing.trace import layer_size
from moa_core.run import Call


class MoAUNet(nn.Module):
    """A diffusers U-Net with a MoA beside every attention layer; call it instead of the U-Net."""

    def __init__(self, unet: UNet2DConditionModel, mixture: Mixture | None, call_type: type[UNetCall] = UNetCall):
        """mixture: the learned one; None where there are only adapters."""
        super().__init__()
        self.unet, self.mixture, self.call_type = unet, mixture, call_type
        self.call: UNetCall | Call | None = None
        """The call under way, kept until the next one: gradient checkpointing comes back to it."""
        self.latent_size = (0, 0)
        """(h, w) of its latents."""
        layers_per_block = unet.config.layers_per_block
        for name, module in unet.named_modules():
            address = Address.from_diffusers(name, layers_per_block)
            if address and isinstance(module, Attention):
                own = module.processor
                prior = own.prior if isinstance(own, MoAProcessor) else own  # not beside another MoA, in its place
                module.set_processor(MoAProcessor(self, address, name.rsplit(".", 1)[-1], prior))

    def forward(self, latents: Tensor, timestep: Tensor, context: Tensor, bound: BoundTokens | None = None) -> Tensor:
        """latents [B, 4, h, w], timestep [B], context [B, T, D] -> predicted noise [B, 4, h, w]."""
        return self.run(latents, timestep, context, self.call_type(self.mixture, context, timestep, bound))

    def run(
        self, latents: Tensor, timestep: Tensor, context: Tensor, call: UNetCall | Call | None, **others: Any
    ) -> Tensor:
        """The same with a call that is there already; None runs the prior alone. others: of the U-Net (SDXL's)."""
        self.call, self.latent_size = call, tuple(latents.shape[2:])
        with self._deltas(call):
            return self.unet(latents, timestep, context, **others).sample

    def _deltas(self, call: UNetCall | Call | None) -> AbstractContextManager:
        if not isinstance(call, Call) or call.adapters is None or call.adapters.deltas is None:
            return nullcontext()
        return deltas_on(self.unet.get_submodule, call.adapters.deltas, lambda: call.changed)


class MoAProcessor:
    """Lets the prior's own processor compute the prior, then mixes."""

    def __init__(self, owner: MoAUNet, address: Address, attention: str, prior: Any):
        self.owner, self.address, self.attention, self.prior = owner, address, attention, prior

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args, **kwargs
    ) -> Tensor:
        call = self.owner.call
        if call is None:
            return self.prior(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        size = layer_size(self.owner.latent_size, hidden_states.shape[1])
        if self.attention == "attn2" and call.in_attention:
            prior = self._attended(attn, call, hidden_states, encoder_hidden_states, size)
        else:
            prior = self.prior(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        return call.mix(self.address, self.attention, hidden_states, prior, size)

    def _attended(self, attn: Attention, call: Call, h: Tensor, context: Tensor, size: tuple[int, int]) -> Tensor:
        """The prior's cross-attention of h [B, N, C] with what the adapters ask within it."""
        q, k = attn.to_q(h), attn.to_k(context)
        prompt = attend(q, k, attn.to_v(context), attn.heads)
        seen = call.attended(self.address, q, k, prompt, size, attend)
        for layer in attn.to_out:
            seen = layer(seen)
        return seen
