"""The training of the judges, on renders made as soft as samples may be."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from training.finetune.contact_sheet import sheet
from training.toy.judges import JUDGES, Readout, accuracy
from training.toy.pretrain.loop import Plan, Trainee, device, train
from training.toy.renders import TEST, TEST_SCENES, TRAIN, draw_renders, to_tensor


def readout_loss(
    readout: Readout, seen: Tensor, answers: dict[str, Tensor], pictures: Tensor, people: Tensor
) -> Tensor:
    """Views [B, 3, H, W] with answers [B], pictures [C, 3, H, W] with people [C, H, W]: mean cross-entropies."""
    logits = readout(seen)
    heads = sum(F.cross_entropy(logits[name], answers[name]) for name in answers)
    return heads + F.binary_cross_entropy_with_logits(readout.person_logits(pictures), people.float())


def soften(pictures: Tensor, random: torch.Generator) -> Tensor:
    """As blurred and noisy as samples may be: half of the batch at half the size, and a little noise on all."""
    half = len(pictures) // 2
    small = F.interpolate(pictures[:half], scale_factor=0.5, mode="area")
    blurred = F.interpolate(small, scale_factor=2, mode="bilinear")
    noise = torch.randn(pictures.shape, generator=random).to(pictures.device)
    return torch.cat([blurred, pictures[half:]]) + 0.05 * noise


def train_readout(plan: Plan) -> None:
    """Train the judges on renders and say how often they are right about people they have never seen."""
    plan.run.mkdir(parents=True, exist_ok=True)
    renders = draw_renders(plan.seed, TRAIN, plan.scenes, plan.workers)
    test = draw_renders(plan.seed, TEST, TEST_SCENES, plan.workers)
    torch.manual_seed(plan.seed)
    readout = Readout()
    trainee = Trainee("readout", readout, plan)

    def loss_of(random: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        who = torch.randint(len(renders.scene), (plan.batch,), generator=random)
        which = torch.randint(len(renders.pixels), (plan.batch // 4,), generator=random)
        answers = {name: answer[who].to(device()) for name, answer in renders.labels.items()}
        seen = soften(renders.views(who).to(device()), random)
        pictures = soften(to_tensor(renders.pixels[which.numpy()]).to(device()), random)
        people = torch.from_numpy(renders.people[which.numpy()]).to(device())
        return readout_loss(readout, seen, answers, pictures, people), {}

    def look(path: Path) -> str:
        readout.eval()
        shown = to_tensor(test.pixels[:8]).to(device())
        found = readout.people(shown)[:, None].expand(-1, 3, -1, -1)
        sheet([shown, found.float() * 2 - 1], path)
        return ", ".join(f"{name} {share:.3f}" for name, share in accuracy(readout, test).items())

    train(trainee, loss_of, look)
    readout.load_state_dict(trainee.average, strict=False)
    readout.save(plan.run / JUDGES.name)
