"""The toy MoA's image encoder, before the MoA: it stands where CLIP's pretraining stands at full size.

A small CLIP vision model learns to tell people apart: who is in a reference picture, whatever they wear and do.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from moa_core.subjects.reference import prepare_reference
from toy_world import shape
from toy_world.draw import draw_person
from toy_world.world import FRAMINGS, sample_person
from training.finetune.contact_sheet import sheet
from training.toy.pretrain.loop import Plan, Trainee, device, train
from training.toy.renders import IDENTITY

TEST = 512
"""So many references, of people no training has seen, are for looking only."""
WIDTHS = ("face_width", "body_width")


class IdentityEncoder(nn.Module):
    """The vision model, and for its training alone a linear head for every attribute of identity."""

    def __init__(self) -> None:
        super().__init__()
        self.model = CLIPVisionModelWithProjection(CLIPVisionConfig(**shape.IMAGE_ENCODER))
        self.norm = nn.LayerNorm(shape.IMAGE_ENCODER["projection_dim"])
        sizes = {name: len(values) for name, values in IDENTITY.items()} | {"widths": len(WIDTHS)}
        self.heads = nn.ModuleDict({name: nn.Linear(self.norm.normalized_shape[0], n) for name, n in sizes.items()})

    def forward(self, references: Tensor) -> dict[str, Tensor]:
        """Prepared references [B, 3, R, R] -> logits of every attribute, and under `widths` numbers [B, 2]."""
        features = self.norm(self.model(pixel_values=references).image_embeds)
        return {name: head(features) for name, head in self.heads.items()}


def identity_loss(answers: dict[str, Tensor], right: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy of the attributes, and the squared error of the widths."""
    attributes = sum(F.cross_entropy(answers[name], right[name]) for name in IDENTITY) / len(IDENTITY)
    return attributes + F.mse_loss(answers["widths"], right["widths"])


def draw_references(seed: int, stream: int, count: int, workers: int = 1) -> tuple[Tensor, dict[str, Tensor]]:
    """References [N, 3, R, R], and what there is to know of the people in them. Stream 1 shows held-out people."""
    with ProcessPoolExecutor(workers) as pool:
        drawn = pool.map(partial(_draw, seed, stream), range(count), chunksize=64)
        drawn = list(tqdm(drawn, total=count, desc="rendering", unit="reference"))
    pictures, known = zip(*drawn, strict=True)
    right = {name: torch.tensor([k[name] for k in known]) for name in (*IDENTITY, "widths")}
    return torch.from_numpy(np.stack(pictures)), right


def _draw(seed: int, stream: int, index: int) -> tuple[np.ndarray, dict]:
    torch.set_num_threads(1)
    rng = np.random.default_rng([seed, 3, stream, index])
    person = sample_person(rng, held_out=stream == 1)
    framing = "full length" if person.action == "riding a bike" else FRAMINGS[int(rng.integers(2))]
    image, mask = draw_person(person.identity, person.word, person.age, person.action, framing, person.clothes)
    pixels = torch.from_numpy(np.array(image)).float() / 255
    prepared = prepare_reference(pixels, torch.from_numpy(mask).float(), shape.IMAGE_ENCODER["image_size"])
    identity = person.identity
    known = {name: values.index(getattr(identity, name)) for name, values in IDENTITY.items()}
    return prepared.half().numpy(), known | {"widths": [getattr(identity, name) for name in WIDTHS]}


def train_encoder(plan: Plan) -> None:
    """Train the image encoder to tell people apart, and write it as a folder that transformers reads."""
    plan.run.mkdir(parents=True, exist_ok=True)
    references, right = draw_references(plan.seed, 0, plan.scenes, plan.workers)
    test, test_right = draw_references(plan.seed, 1, TEST, plan.workers)
    torch.manual_seed(plan.seed)
    encoder = IdentityEncoder()
    trainee = Trainee("encoder", encoder, plan)

    def loss_of(random: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        which = torch.randint(len(references), (plan.batch,), generator=random)
        seen = references[which].float()
        seen = torch.where(torch.rand(len(seen), 1, 1, 1, generator=random) < 0.5, seen, seen.flip(-1))
        seen = seen + 0.05 * torch.randn(seen.shape, generator=random)
        return identity_loss(encoder(seen.to(device())), {k: v[which].to(device()) for k, v in right.items()}), {}

    def look(path: Path) -> str:
        encoder.eval()
        answers = encoder(test.float().to(device()))
        sheet(list((test[:16].float() * 0.27).clamp(-1, 1).split(8)), path)
        shares = {name: (answers[name].argmax(1).cpu() == test_right[name]).float().mean() for name in IDENTITY}
        off = (answers["widths"].cpu() - test_right["widths"]).abs().mean()
        return ", ".join(f"{name} {share:.3f}" for name, share in shares.items()) + f", widths off by {off:.3f}"

    train(trainee, loss_of, look)
    encoder.load_state_dict(trainee.average, strict=False)
    encoder.model.save_pretrained(plan.run / "encoder")
