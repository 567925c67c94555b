"""The toy base model's autoencoder: a TAESD that learns narrow, and is widened with zeros to the size its hosts expect.

TAESD is 64 channels wide everywhere, which a CPU trains at 2 pictures a second. Fewer channels where the
picture is large, and fewer blocks in the encoder, give several times that. A zero channel stays zero through
convolution and ReLU, and a block of zeros is a ReLU, so the widened autoencoder is the same function.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderTiny
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from torch import Tensor, nn

LEVELS = 4
"""The picture's side and its halves; the latents live at the last one."""
ENCODER = ((16, 0), (32, 1), (48, 2), (64, 3))
"""Channels and blocks (of TAESD's 1, 3, 3, 3) per level, from the picture to the latents."""
DECODER = ((64, 3), (64, 3), (32, 2), (16, 1))
"""The same from the latents to the picture."""
TAESD_ENCODER_BLOCKS, TAESD_DECODER_BLOCKS = (1, 3, 3, 3), (3, 3, 3, 1)
LATENT_CHANNELS = 4


class NarrowVAE(nn.Module):
    """TAESD's layers in TAESD's places, so that a weight has the same name in `AutoencoderTiny`."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"layers": nn.Sequential(*_encoder())})
        self.decoder = nn.ModuleDict({"layers": nn.Sequential(*_decoder())})
        self.apply(_start)
        self.to(memory_format=torch.channels_last)

    def moments(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] in -1..1 -> the latents [B, 4, H / 8, W / 8], and their standard deviation: 0."""
        latents = self.encoder["layers"](pictures / 2 + 0.5)
        return latents, torch.zeros_like(latents)

    def encode(self, pictures: Tensor, noise: Tensor | None = None) -> Tensor:
        """[B, 3, H, W] in -1..1 -> latents [B, 4, H / 8, W / 8] of about unit variance; there is nothing to sample."""
        return self.moments(pictures)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """[B, 4, h, w] -> [B, 3, 8h, 8w] in -1..1."""
        return self.decoder["layers"]((latents / 3).tanh() * 3) * 2 - 1

    @torch.no_grad()
    def widen(self) -> AutoencoderTiny:
        """The same function in 64 channels everywhere."""
        wide, own = AutoencoderTiny().eval(), self.state_dict()
        for name, weight in wide.state_dict().items():
            weight.zero_()
            if name in own:
                weight[tuple(slice(n) for n in own[name].shape)] = own[name]
        return wide

    @classmethod
    @torch.no_grad()
    def of(cls, wide: AutoencoderTiny) -> NarrowVAE:
        """The narrow autoencoder in a widened one. Raises ValueError where it is really wide."""
        narrow, weights = cls(), wide.state_dict()
        for name, own in narrow.state_dict().items():
            own.copy_(weights[name][tuple(slice(n) for n in own.shape)])
        again = narrow.widen().state_dict()
        if not all(torch.equal(again[name], weight.to(again[name])) for name, weight in weights.items()):
            raise ValueError("the autoencoder was not made by training.toy: it is wider than the toy world's")
        return narrow.eval()


def _start(module: nn.Module) -> None:
    """Weights that keep a signal's size through ReLUs, and blocks that begin as the identity.

    There is no normalization; from torch's own smaller weights the first hundreds of steps teach nothing.
    """
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, AutoencoderTinyBlock):  # comes after its own convolutions
        nn.init.zeros_(module.conv[-1].weight)


def _blocks(channels: int, count: int, of: int) -> list[nn.Module]:
    """`count` blocks in the places of `of`: a ReLU stands for a block that is left out."""
    return [AutoencoderTinyBlock(channels, channels, "relu") if i < count else nn.ReLU() for i in range(of)]


def _encoder() -> list[nn.Module]:
    layers, before = [], 3
    for level, ((channels, blocks), of) in enumerate(zip(ENCODER, TAESD_ENCODER_BLOCKS, strict=True)):
        stride = 1 if level == 0 else 2
        layers.append(nn.Conv2d(before, channels, 3, stride, padding=1, bias=level == 0))
        layers += _blocks(channels, blocks, of)
        before = channels
    return [*layers, nn.Conv2d(before, LATENT_CHANNELS, 3, padding=1)]


def _decoder() -> list[nn.Module]:
    layers = [nn.Conv2d(LATENT_CHANNELS, DECODER[0][0], 3, padding=1), nn.ReLU()]
    after = [channels for channels, _ in DECODER[1:]] + [3]
    for level, ((channels, blocks), of) in enumerate(zip(DECODER, TAESD_DECODER_BLOCKS, strict=True)):
        layers += _blocks(channels, blocks, of)
        last = level == LEVELS - 1
        layers += [] if last else [nn.Upsample(scale_factor=2)]
        layers.append(nn.Conv2d(channels, after[level], 3, padding=1, bias=last))
    return layers
