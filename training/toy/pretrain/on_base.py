"""What ControlNet and LoRA of the toy world have in common: a finished base model, and scenes in its latents."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from toy_world.world import PLACES
from training.finetune.contact_sheet import sheet
from training.host.base import Base
from training.host.schedule import TIMESTEPS
from training.host.tokenizer import tokenize
from training.toy.pretrain.loop import Plan, Trainee, autocast, device, train
from training.toy.pretrain.unet import GAMMA, diffusion_loss, sample
from training.toy.renders import to_tensor

HELD_OUT = 64
"""So many scenes at the end of the set are for the held-out loss only."""
PLACES_SHOWN = len(PLACES)
STEPS, CFG = 12, 3.0
"""Of the pictures on the contact sheet."""


@dataclass
class Scenes:
    """latents [N, 4, h, w]; ids [N, 77]; control: what else the model is shown of each, tensors [N, ...]."""

    latents: Tensor
    ids: Tensor
    control: tuple[Tensor, ...] = ()

    @classmethod
    @torch.no_grad()
    def of(cls, base: Base, pixels: Tensor, captions: list[str], *control: Tensor) -> Scenes:
        """pixels: uint8 [N, H, W, 3]."""
        vae = base.autoencoder.to(device())
        with autocast():
            latents = torch.cat([vae.encode(to_tensor(part).to(device())).cpu() for part in pixels.split(32)])
        return cls(latents.float(), torch.tensor([tokenize(caption) for caption in captions]), control)

    def at(self, which: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        latents, ids, *control = (x[which].to(device()) for x in (self.latents, self.ids, *self.control))
        return latents, ids, tuple(c.float().movedim(-1, 1) / 255 for c in control)


def train_on_base(
    plan: Plan,
    name: str,
    base: Base,
    model: nn.Module,
    scenes: Scenes,
    dropped: float,
    prompts: list[str],
    gamma: float = GAMMA,
) -> None:
    """Train what is not frozen of a model that denoises: latents, timestep, ids, *control -> noise.

    dropped: share of captions replaced by the empty one. The contact sheet shows the prompts, under the control of
    the first held-out scenes. Under a control most timesteps are noisy ones, which lay out the picture: cubic sampling
    (T2I-Adapter, Mou et al., 2023, 3.3). gamma: of the min-SNR weighting.
    """
    weighted = partial(diffusion_loss, gamma=gamma)
    trainee, loss = Trainee(name, model, plan), plan.loss(weighted)
    empty = torch.tensor(tokenize(""), device=device())
    known = len(scenes.latents) - HELD_OUT

    def noised(which: Tensor, random: torch.Generator) -> tuple:
        """The arguments of the loss after the model."""
        latents, ids, control = scenes.at(which)
        ids = torch.where((torch.rand(len(which), 1, generator=random) < dropped).to(device()), empty, ids)
        timestep = torch.randint(TIMESTEPS, (len(which),), generator=random).to(device())
        if control:
            timestep = TIMESTEPS - 1 - timestep**3 // TIMESTEPS**2
        noise = torch.randn(latents.shape, generator=random).to(device())
        return latents, ids, timestep, noise, *control

    def loss_of(random: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return loss(model, *noised(torch.randint(known, (plan.batch,), generator=random), random)), {}

    def look(path: Path) -> str:
        model.eval()
        random = torch.Generator().manual_seed(0)
        losses = [weighted(model, *noised(part, random)) for part in torch.arange(known, known + HELD_OUT).split(16)]
        _, _, control = scenes.at(torch.arange(known, known + len(prompts)))
        ids = torch.tensor([tokenize(prompt) for prompt in prompts], device=device())
        noise = torch.randn(len(prompts), *scenes.latents.shape[1:], generator=random).to(device())
        drawn = base.autoencoder.decode(sample(model, ids, empty, noise, STEPS, CFG, *control))
        shown = [c * 2 - 1 for c in control]
        sheet([row for part in (*shown, drawn) for row in part.split(PLACES_SHOWN)], path)
        return f"held-out loss {float(torch.stack(losses).mean()):.4f}"

    train(trainee, loss_of, look)
    model.load_state_dict(trainee.average, strict=False)
