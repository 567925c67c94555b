"""Identity preservation and prompt consistency as FastComposer's published script measures them, with intervals.

As there: its subjects and prompts, where its list is given; the first picture of every subject; four pictures of each
prompt with each subject, 512x512, 50 steps, guidance 5; MTCNN finds the faces, FaceNet compares the largest with the
reference's (faces.py), CLIP ViT-L/14 compares picture and prompt (clip_score.py). Not as there: the sampler is UniPC,
the MoA paper's; the noise; the prior is drawn too, from the same noise; prompts of two people, of which it lists none,
are drawn with every pair, and the worse of both faces counts.

    subjects/ann/1.jpg ...     her pictures, one face each; 1.mask.png beside 1.jpg shows where she is (white)
    subjects/ann/word.txt      the word she stands for: woman, man; without the file, person
    prompts.txt                one a line: `a <subject> riding a horse`
    data.py                    in its place FastComposer's evaluation/single_object/data.py, which lists prompts,
                               subjects and their words; the subjects are its data/celeba_test_single

A stopped evaluation goes on where it was. The FaceNet file comes from the published VGGFace2 weights; once:

    from facenet_pytorch import InceptionResnetV1; from safetensors.torch import save_file
    save_file(InceptionResnetV1(pretrained="vggface2").state_dict(), "facenet.safetensors")
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from moa_core.files.whole_file import write_whole
from moa_core.learned.moa_file import load_moa
from moa_core.subjects.binding import Binding
from training.config import config_of
from training.data.processes import gathered, processes, share
from training.evaluation.clip_score import ClipJudge
from training.evaluation.faces import FaceJudge
from training.evaluation.fastcomposer_lists import read_published
from training.evaluation.fingerprint import fingerprint
from training.evaluation.judges import Judges, Score
from training.evaluation.references import ReferencePerson, read_people
from training.evaluation.report import result_of, table
from training.evaluation.shots import PLACEHOLDER, Shot, plan, read_prompts
from training.finetune.checkpoint import checkpoints, read_state
from training.finetune.trained import trained_pipeline
from training.host.pipeline import MoAPipeline
from training.host.pretrained import load_base

SETTINGS = "settings.json"


@dataclass(frozen=True)
class Sampling:
    """How pictures are drawn; UniPC, as in the paper."""

    steps: int
    cfg: float
    seed: int


def evaluate(
    pipeline: MoAPipeline,
    judges: Judges,
    people: Sequence[ReferencePerson],
    prompts: list[str],
    out: Path,
    images: int,
    sampling: Sampling,
    method: str = "moa",
) -> dict:
    """Draws and scores what `out` lacks; returns result.json. Processes share the work. Raises ValueError.

    method: what the pipeline samples, the name of its row and its pictures' folder.
    """
    base = pipeline.base
    settings = asdict(sampling) | {
        "base": fingerprint(base.unet, base.text_encoder, base.autoencoder),
        "method": method,
        "moa": fingerprint(pipeline.moa),
        "prompts": prompts,
        "subjects": {person.name: person.fingerprint for person in people},
    }
    shots = list(plan(people, prompts, images))
    subjects = {person.name: pipeline.encode_subject(person.pixels, person.word, person.masks) for person in people}
    bindings = [shot.bindings([subjects[person.name] for person in shot.people]) for shot in shots]
    _claim(out, settings)
    rows = ("prior", method)
    work = [(row, number) for number in range(len(shots)) for row in rows]
    scores: dict[tuple[str, int], Score] = {}
    for row, number in tqdm(share(work), unit="picture", disable=not processes().is_main_process):
        shot, path = shots[number], out / row / f"{shots[number].name}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            strength = 0.0 if row == "prior" else 1.0
            write_whole(path, _draw(pipeline, shot, bindings[number], sampling, strength))
        scores[row, number] = judges.score(shot, path)
    everyones = dict(gathered(list(scores.items())))
    by_row = {row: [everyones[row, number] for number in range(len(shots))] for row in rows}
    return result_of(shots, by_row, prompts, settings)


def _claim(out: Path, settings: dict) -> None:
    """Pictures of two settings never mix in one folder."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / SETTINGS
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if changed := [name for name, value in settings.items() if before.get(name) != value]:
            raise ValueError(
                f"{out} holds an evaluation with other settings ({', '.join(changed)}): give the same again to go on "
                "with it, or another --out"
            )
    processes().wait_for_everyone()  # until all have looked
    if processes().is_main_process:
        write_whole(path, json.dumps(settings, indent=1).encode())


def _draw(pipeline: MoAPipeline, shot: Shot, bindings: list[Binding], sampling: Sampling, strength: float) -> bytes:
    """A PNG file."""
    contexts = [pipeline.encode_prompt(text) for text in (shot.prompt, "")]
    options = {"steps": sampling.steps, "cfg": sampling.cfg, "seed": shot.seed(sampling.seed), "strength": strength}
    pictures, _ = pipeline.sample(*contexts, bindings, sparse=False, **options)
    file = io.BytesIO()
    Image.fromarray((pictures[0] * 255).round().byte().numpy()).save(file, "PNG")
    return file.getvalue()


def paper(
    base: Path,
    moa: Path | None,
    run: Path | None,
    subjects: Path,
    prompts: Path,
    out: Path,
    facenet: Path,
    clip: Path,
    images: int,
    all_pictures: bool,
    sampling: Sampling,
) -> dict:
    """The whole evaluation, from files; writes result.json and result.md. Raises ValueError.

    Of a MoA file, or of the newest checkpoint of a run, which may be of any method.
    """
    if min(images, sampling.steps) < 1:
        raise ValueError(f"--images is {images}, --steps is {sampling.steps}: both must be 1 or more")
    published = read_published(prompts, PLACEHOLDER) if prompts.suffix == ".py" else None
    texts = published.prompts if published else read_prompts(prompts)
    people = read_people(subjects, published.words if published else None, all_pictures)
    state = processes()
    judges = Judges(FaceJudge(facenet, state.device), ClipJudge(clip, state.device), people)
    pipeline, method = _of_file(base, moa, state.device) if moa else _of_run(base, run, state.device)
    result = evaluate(pipeline, judges, people, texts, out, images, sampling, method)
    if state.is_main_process:
        write_whole(out / "result.json", json.dumps(result, indent=1).encode())
        write_whole(out / "result.md", (table(result) + "\n").encode())
    return result


def _of_file(base: Path, moa: Path, device: torch.device) -> tuple[MoAPipeline, str]:
    model, mixture = load_base(base), load_moa(moa)
    if mixture.config.base != model.family:
        raise ValueError(f"--moa: {moa} is for the base model {mixture.config.base}, --base holds {model.family}")
    return MoAPipeline(model.to(device), mixture.to(device)), "moa"


def _of_run(base: Path, run: Path, device: torch.device) -> tuple[MoAPipeline, str]:
    there = checkpoints(run / "checkpoints")
    if not there:
        raise ValueError(f"--run: {run} holds no checkpoint; expected the run.out of a training")
    config = config_of(there[-1], read_state(there[-1])["config"])
    config = replace(config, model=replace(config.model, base=str(base)))
    return trained_pipeline(config, there[-1], device), config.model.method
