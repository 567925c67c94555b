"""The toy base model's text encoder and U-Net, trained together on latents as Stable Diffusion was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from diffusers import UniPCMultistepScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moa_core.files.whole_file import whole
from toy_world import shape
from toy_world.shape import BASE, IMAGE_SIZE
from toy_world.world import PLACES
from training.finetune.contact_sheet import sheet
from training.host.base import Base
from training.host.narrow_vae import NarrowVAE
from training.host.schedule import SCHEDULE, TIMESTEPS, add_noise, min_snr
from training.host.tokenizer import tokenize
from training.host.toy_base import random_toy, save_toy
from training.toy.pretrain.loop import Plan, Trainee, autocast, base_of, device, plain_attention, read_average, train
from training.toy.pretrain.scenes import RenderedScenes, rendered
from training.toy.renders import to_tensor

GAMMA = 5.0
"""Of the min-SNR weighting."""
DROPPED = 0.1
"""Share of captions replaced by the empty one, for classifier-free guidance."""
LATENTS = "latents.safetensors"
"""What the U-Net learns from, in the run folder."""
HELD_OUT = 256
"""So many latents at the end of the set are for the held-out loss only."""
STEPS, CFG = 20, 5.0
"""Of the pictures on the contact sheet."""


class Denoiser(nn.Module):
    """U-Net and text encoder as one model."""

    def __init__(self, base: Base):
        super().__init__()
        self.unet = base.unet.requires_grad_(True).to(memory_format=torch.channels_last)  # a quarter faster on a CPU
        self.text_encoder = base.text_encoder.requires_grad_(True)
        plain_attention(self.unet)
        self.text_encoder.set_attn_implementation("eager")

    def forward(self, latents: Tensor, timestep: Tensor, ids: Tensor) -> Tensor:
        """latents [B, 4, h, w], timestep [B], token ids [B, 77] -> predicted noise [B, 4, h, w]."""
        return self.unet(latents, timestep, self.text_encoder(ids).last_hidden_state).sample


def diffusion_loss(
    model: nn.Module,
    latents: Tensor,
    ids: Tensor,
    timestep: Tensor,
    noise: Tensor,
    *control: Tensor,
    gamma: float = GAMMA,
) -> Tensor:
    """Squared error of the predicted noise, min-SNR weighted; latents and noise [B, 4, h, w], timestep [B].

    control: what else the model reads.
    """
    predicted = model(add_noise(latents, noise, timestep), timestep, ids, *control)
    error = (predicted.float() - noise).square().mean(dim=(1, 2, 3))
    return (error * min_snr(timestep, gamma)).mean()


def encoded(plan: Plan) -> tuple[Tensor, Tensor]:
    """Latents [N, 4, h, w] and token ids [N, 77] of the rendered scenes, kept in the run folder.

    Made again when the encoder or the scenes are others.
    """
    pictures = rendered(plan, IMAGE_SIZE)
    vae = NarrowVAE().eval()
    read_average(plan.run / "vae.safetensors", vae)
    weights = b"".join(weight.numpy().tobytes() for weight in vae.encoder.state_dict().values())
    source = json.dumps([hashlib.sha256(weights).hexdigest(), *pictures.recipe.values()])
    path = plan.run / LATENTS
    if not path.exists() or _source(path) != source:
        _write_latents(path, vae.to(device()), pictures, source)
    tensors = load_file(path)
    return tensors["latents"].to(device()), tensors["ids"].to(device())


def _source(path: Path) -> str:
    with safe_open(path, "pt") as file:
        return file.metadata()["source"]


@torch.no_grad()
def _write_latents(path: Path, vae: NarrowVAE, pictures: RenderedScenes, source: str) -> None:
    print(f"encoding {len(pictures.captions)} pictures", flush=True)
    with autocast():
        parts = [
            vae.encode(to_tensor(pictures.pixels[i : i + 64]).to(device())).half().cpu()
            for i in range(0, len(pictures.captions), 64)
        ]
    ids = torch.tensor([tokenize(caption) for caption in pictures.captions], dtype=torch.int32)
    with whole(path) as unfinished:
        save_file({"latents": torch.cat(parts).contiguous(), "ids": ids}, unfinished, {"source": source})


def train_unet(plan: Plan) -> None:
    """Train text encoder and U-Net on the latents of rendered scenes."""
    latents, ids = encoded(plan)
    model = Denoiser(base_of(plan) if plan.base else random_toy(plan.seed))
    trainee = Trainee("unet", model, plan)
    vae = NarrowVAE().eval()
    read_average(plan.run / "vae.safetensors", vae)
    vae.to(device())
    empty = torch.tensor(tokenize(""), device=device())
    loss = plan.loss(diffusion_loss)

    def batch(indices: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """latents, ids, timestep, noise."""
        x = latents[indices.to(device())].float()
        timestep = torch.randint(TIMESTEPS, (len(indices),), generator=random)
        noise = torch.randn(x.shape, generator=random)
        return x, ids[indices.to(device())].long(), timestep.to(device()), noise.to(device())

    def loss_of(random: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        indices = torch.randint(len(latents) - HELD_OUT, (plan.batch,), generator=random)
        x, tokens, timestep, noise = batch(indices, random)
        dropped = torch.rand(plan.batch, 1, generator=random) < DROPPED
        tokens = torch.where(dropped.to(device()), empty, tokens)
        return loss(model, x, tokens, timestep, noise), {}

    def look(path: Path) -> str:
        model.eval()
        held_out = torch.arange(len(latents) - HELD_OUT, len(latents))
        random = torch.Generator().manual_seed(0)
        losses = [diffusion_loss(model, *batch(part, random)) for part in held_out.split(64)]
        prompts = [tokenize(prompt) for prompt in PROMPTS]
        noise = torch.randn(len(prompts), *latents.shape[1:], generator=random).to(device())
        drawn = vae.decode(sample(model, torch.tensor(prompts, device=device()), empty, noise, STEPS, CFG))
        sheet(list(drawn.split(len(PLACES))), path)
        return f"held-out loss {float(torch.stack(losses).mean()):.4f}"

    train(trainee, loss_of, look)


WORDINGS = ("a portrait of a man waving", "a woman riding a bike", "a kid man holding a book and an old woman standing")
PROMPTS = [f"{wording} {place}" for wording in WORDINGS for place in PLACES.values()]
"""What the contact sheet shows: a row for each wording, a column for each place."""


@torch.no_grad()
def sample(
    model: nn.Module,
    ids: Tensor,
    empty: Tensor,
    noise: Tensor,
    steps: int,
    cfg: float,
    *control: Tensor,
) -> Tensor:
    """From noise [B, 4, h, w] to latents; ids [B, 77], empty [77]; control: what else the model reads [B, ...]."""
    scheduler = UniPCMultistepScheduler(**SCHEDULE)
    scheduler.set_timesteps(steps)
    both, control = torch.cat([ids, empty.expand_as(ids)]), [torch.cat([c] * 2) for c in control]
    for t in scheduler.timesteps:
        timestep = t.to(noise.device).expand(len(both))
        positive, negative = model(torch.cat([noise] * 2), timestep, both, *control).chunk(2)
        noise = scheduler.step(negative + cfg * (positive - negative), t, noise).prev_sample
    return noise


def assemble(run: Path, out: Path) -> None:
    """Write the averaged weights of a run folder as one checkpoint, which CheckpointLoaderSimple reads.

    Embeddings of tokens that no caption holds never learnt: they are written as zero, which compresses.
    """
    vae, model = NarrowVAE(), Denoiser(random_toy())
    steps = {
        "vae": read_average(run / "vae.safetensors", vae),
        "unet": read_average(run / "unet.safetensors", model),
    }
    unknown = torch.ones(shape.TEXT_ENCODER["vocab_size"], dtype=torch.bool)
    unknown[load_file(run / LATENTS)["ids"].long().unique()] = False
    model.text_encoder.get_input_embeddings().weight.data[unknown] = 0.0
    save_toy(Base(model.unet, model.text_encoder, vae, BASE), out)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB, from steps {steps}")
