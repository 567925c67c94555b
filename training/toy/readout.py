"""Judges of pictures of the toy world: who is in them, what they do, where, and which pixels are people.

Trained on renders alone, never on samples, and never seen by the training of base model or MoA. A person is
looked at in their own view: the whole picture of one person, the left or right half of a picture of two.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moa_core.whole_file import whole
from toy_world.draw import draw_scene
from toy_world.shape import IMAGE_SIZE
from toy_world.world import ACTIONS, AGES, HAIRS, PLACES, SKINS, STYLES, Person, Scene, sample_scene
from training.toy.pretrain import Plan, Trainee, device, to_tensor, train
from training.validate import sheet

NO_YES = (False, True)
IDENTITY = {"skin": SKINS, "hair": HAIRS, "style": STYLES, "glasses": NO_YES, "beard": NO_YES}
CONTEXT = {"scene": tuple(PLACES), "action": ACTIONS, "age": AGES}
ATTRIBUTES = IDENTITY | CONTEXT
TRAIN, TEST = 1, 2
"""Random streams of the renders, apart from those of the base model's pictures."""
TEST_SCENES = 400
JUDGES = Path(__file__).with_name("judges.safetensors")
"""The trained judges, the same for everyone."""


class Classifier(nn.Module):
    """A small CNN with a head for every attribute of identity and context."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            *_down(3, 16), *_down(16, 32), *_down(32, 64), *_down(64, 128), *_down(128, 128), nn.Flatten(),
            nn.Dropout(0.2), nn.Linear(128 * (IMAGE_SIZE // 32) ** 2, 128), nn.ReLU(),
        )  # fmt: skip
        self.heads = nn.ModuleDict({name: nn.Linear(128, len(values)) for name, values in ATTRIBUTES.items()})

    def forward(self, views: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] in -1..1 -> logits [B, values] of every attribute."""
        x = self.trunk(views)
        return {name: head(x) for name, head in self.heads.items()}


class Segmenter(nn.Module):
    """Which pixels are people, by what is around them at four scales."""

    WIDTHS = (8, 24, 48, 64)

    def __init__(self) -> None:
        super().__init__()
        before = (3, *self.WIDTHS)
        self.down = nn.ModuleList(nn.Sequential(*_down(a, b)) for a, b in zip(before, self.WIDTHS, strict=False))
        self.up = nn.ModuleList(_convolution(a + b, a) for a, b in zip(self.WIDTHS, self.WIDTHS[1:], strict=False))
        self.out = nn.Conv2d(self.WIDTHS[0], 1, 3, padding=1)

    def forward(self, pictures: Tensor) -> Tensor:
        """[B, 3, H, W] in -1..1 -> logits [B, H, W]."""
        levels = []
        for down in self.down:
            levels.append(down(levels[-1] if levels else pictures))
        x = levels[-1]
        for up, level in reversed(list(zip(self.up, levels[:-1], strict=True))):
            x = up(torch.cat([level, F.interpolate(x, scale_factor=2)], dim=1))
        return F.interpolate(self.out(x), scale_factor=2, mode="bilinear")[:, 0]


def _convolution(before: int, after: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU())


def _down(before: int, after: int) -> nn.Sequential:
    return _convolution(before, after, stride=2)


class Readout(nn.Module):
    """All judges."""

    def __init__(self) -> None:
        super().__init__()
        self.attributes, self.person = Classifier(), Segmenter()
        self.to(memory_format=torch.channels_last)

    def save(self, path: Path) -> None:
        """As float16, whole or not at all."""
        weights = {k: v.cpu().half() if v.is_floating_point() else v.cpu() for k, v in self.state_dict().items()}
        with whole(path) as unfinished:
            save_file({name: weight.contiguous() for name, weight in weights.items()}, unfinished)

    @classmethod
    def load(cls, path: Path = JUDGES) -> Readout:
        """Raises ValueError for a file that holds no judges."""
        readout = cls()
        try:
            readout.load_state_dict(load_file(path))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ValueError(f"{path} holds no judges ({error}); train them: make toy-judges") from error
        return readout.eval()

    def forward(self, views: Tensor) -> dict[str, Tensor]:
        """Views [B, 3, H, W] -> logits [B, values] of every attribute."""
        return self.attributes(views)

    @torch.no_grad()
    def people(self, pictures: Tensor) -> Tensor:
        """[B, 3, H, W] in -1..1 -> bool [B, H, W], True on people, but not on what they hold or ride."""
        return self.person(pictures) > 0


def views(pictures: Tensor, people: int) -> list[Tensor]:
    """Pictures [B, 3, H, W] -> for each person, from left to right, their view [B, 3, H, W] between grey margins."""
    if people == 1:
        return [pictures]
    half = pictures.shape[-1] // 2
    return [F.pad(side, (half // 2, half // 2)) for side in pictures.split(half, dim=-1)]


def labels(scene: Scene, person: Person) -> dict[str, int]:
    """The right answer of every head, as a number."""
    known = vars(person.identity) | {"scene": scene.place, "action": person.action, "age": person.age}
    return {name: values.index(known[name]) for name, values in ATTRIBUTES.items()}


@dataclass(frozen=True)
class Renders:
    """N scenes of M people: pixels uint8 [N, H, W, 3], people bool [N, H, W], labels [M] and the owner's scene [M]."""

    pixels: np.ndarray
    people: np.ndarray
    scene: Tensor
    """[M]: the number of each person's picture."""
    place: Tensor
    """[M, 2]: which person of how many."""
    labels: dict[str, Tensor]

    def views(self, who: Tensor) -> Tensor:
        """[K] numbers of people -> their views [K, 3, H, W]."""
        pictures = to_tensor(self.pixels[self.scene[who].numpy()])
        place = self.place[who].tolist()
        return torch.cat([views(p[None], count)[side] for p, (side, count) in zip(pictures, place, strict=True)])


def draw_renders(seed: int, stream: int, count: int, workers: int = 1) -> Renders:
    """Scenes for one split; those of the test split show people that no training has seen."""
    with ProcessPoolExecutor(workers) as pool:
        drawn = list(pool.map(partial(_draw, seed, stream), range(count), chunksize=64))
    pictures, masks, scenes = zip(*drawn, strict=True)
    everyone = [(n, i, scene) for n, scene in enumerate(scenes) for i in range(len(scene.people))]
    answers = [labels(scene, scene.people[i]) for _, i, scene in everyone]
    return Renders(
        np.stack(pictures),
        np.stack(masks),
        torch.tensor([n for n, _, _ in everyone]),
        torch.tensor([(i, len(scene.people)) for _, i, scene in everyone]),
        {name: torch.tensor([answer[name] for answer in answers]) for name in answers[0]},
    )


def _draw(seed: int, stream: int, index: int) -> tuple[np.ndarray, np.ndarray, Scene]:
    scene = sample_scene(np.random.default_rng([seed, stream, index]), held_out=stream == TEST)
    image, ids = draw_scene(scene, IMAGE_SIZE)
    return np.asarray(image), ids > 0, scene


def readout_loss(
    readout: Readout, seen: Tensor, answers: dict[str, Tensor], pictures: Tensor, people: Tensor
) -> Tensor:
    """Views [B, 3, H, W] with answers [B], pictures [C, 3, H, W] with people [C, H, W]: mean cross-entropies."""
    logits = readout(seen)
    heads = sum(F.cross_entropy(logits[name], answers[name]) for name in answers)
    return heads + F.binary_cross_entropy_with_logits(readout.person(pictures), people.float())


def soften(pictures: Tensor, random: torch.Generator) -> Tensor:
    """As blurred and noisy as samples may be: half of the batch at half the size, and a little noise on all."""
    half = len(pictures) // 2
    small = F.interpolate(pictures[:half], scale_factor=0.5, mode="area")
    blurred = F.interpolate(small, scale_factor=2, mode="bilinear")
    noise = torch.randn(pictures.shape, generator=random).to(pictures.device)
    return torch.cat([blurred, pictures[half:]]) + 0.05 * noise


@torch.no_grad()
def accuracy(readout: Readout, renders: Renders) -> dict[str, float]:
    """Share of right answers per head, and how well people's pixels are found (intersection over union)."""
    where = next(readout.parameters()).device
    right = {name: 0 for name in renders.labels}
    for who in torch.arange(len(renders.scene)).split(128):
        for name, logits in readout(renders.views(who).to(where)).items():
            right[name] += int((logits.argmax(dim=1).cpu() == renders.labels[name][who]).sum())
    found = torch.cat([readout.people(to_tensor(part).to(where)).cpu() for part in np.array_split(renders.pixels, 8)])
    people = torch.from_numpy(renders.people)
    overlap = float((found & people).sum() / (found | people).sum())
    return {name: count / len(renders.scene) for name, count in right.items()} | {"people": overlap}


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
