"""The toy base model's autoencoder: a TAESD trained narrow, and widened with zeros to the size its hosts expect.

TAESD is 64 channels wide everywhere, which a CPU trains at 2 pictures a second. Fewer channels where the
picture is large, and fewer blocks in the encoder, give several times that. A zero channel stays zero through
convolution and ReLU, and a block of zeros is a ReLU, so the widened autoencoder is the same function.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from torch import Tensor, nn

from toy_world.shape import IMAGE_SIZE
from training.toy.pretrain import Pictures, Plan, Trainee, device, rendered, to_tensor, train
from training.validate import sheet

LEVELS = 4
"""The picture's side and its halves; the latents live at the last one."""
ENCODER = ((16, 0), (32, 1), (48, 2), (64, 3))
"""Channels and blocks (of TAESD's 1, 3, 3, 3) per level, from the picture to the latents."""
DECODER = ((64, 3), (64, 3), (32, 2), (16, 1))
"""The same from the latents to the picture."""
TAESD_ENCODER_BLOCKS, TAESD_DECODER_BLOCKS = (1, 3, 3, 3), (3, 3, 3, 1)
LATENT_CHANNELS = 4
FARTHEST = 2.5
"""Latents are kept within this: the decoder squeezes what it reads by 3 * tanh(z / 3)."""
NOISE = 0.05
"""Added to the latents in training: what the U-Net paints is never exact either."""
CROP = 64
HELD_OUT = 64
"""So many pictures at the end of the set are for looking only."""


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


def vae_loss(vae: NarrowVAE, pictures: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Pictures [B, 3, H, W] in -1..1, noise [B, 4, H / 8, W / 8]: difference, edges, and the latents' shape."""
    latents = vae.encode(pictures)
    restored = vae.decode(latents + NOISE * noise)
    difference = (restored - pictures).abs().mean()
    edges = sum((_slope(restored, axis) - _slope(pictures, axis)).abs().mean() for axis in (2, 3))
    spread, middle = torch.std_mean(latents.float(), dim=(0, 2, 3))
    shape = (middle.square() + (spread - 1).square()).mean() + F.relu(latents.abs() - FARTHEST).square().mean()
    return difference + 0.5 * edges + 0.1 * shape, {"l1": difference.detach(), "shape": shape.detach()}


def _slope(x: Tensor, axis: int) -> Tensor:
    return x.diff(dim=axis)


def psnr(a: Tensor, b: Tensor) -> float:
    """Of pictures in -1..1, in dB."""
    return -10 * float(((a - b) / 2).square().mean().log10())


def crops(pictures: Pictures, count: int, random: torch.Generator) -> Tensor:
    """Random squares [B, 3, CROP, CROP]: the middle, where people are, most often, and the borders often enough."""
    size = pictures.pixels.shape[1]
    index = torch.randint(len(pictures.pixels) - HELD_OUT, (count,), generator=random)
    corner = torch.randint(-8, size - CROP + 9, (count, 2), generator=random).clamp(0, size - CROP)
    squares = [
        pictures.pixels[i, y : y + CROP, x : x + CROP]
        for i, (y, x) in zip(index.tolist(), corner.tolist(), strict=True)
    ]
    return to_tensor(np.stack(squares))


def train_vae(plan: Plan, decoder_only: bool = False) -> None:
    """Train the autoencoder on squares of rendered scenes.

    decoder_only: the encoder stays as its average is, so that the U-Net may learn from its latents meanwhile.
    """
    pictures = rendered(plan, IMAGE_SIZE)
    torch.manual_seed(plan.seed)
    vae = NarrowVAE()
    trainee = Trainee("vae", vae, plan)
    if decoder_only:
        vae.load_state_dict({k: v for k, v in trainee.average.items() if k.startswith("encoder.")}, strict=False)
        vae.encoder.requires_grad_(False)
    shown = to_tensor(pictures.pixels[-HELD_OUT:]).to(device())

    def loss_of(random: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        batch = crops(pictures, plan.batch, random)
        noise = torch.randn(plan.batch, LATENT_CHANNELS, CROP // 8, CROP // 8, generator=random)
        return vae_loss(vae, batch.to(device()), noise.to(device()))

    def look(path: Path) -> str:
        latents = vae.encode(shown)
        restored = vae.decode(latents)
        sheet([shown[:8], restored[:8], shown[8:16], restored[8:16]], path)
        spread = ", ".join(f"{s:.2f}" for s in latents.std(dim=(0, 2, 3)).tolist())
        return f"PSNR {psnr(restored, shown):.2f} dB, latents' std {spread}, largest {float(latents.abs().max()):.2f}"

    train(trainee, loss_of, look)
