"""The paper's figures, identity preservation and prompt consistency, with intervals.

As FastComposer and MoA evaluate. Every prompt is drawn with every subject, four times. Identity preservation:
MTCNN finds the faces, FaceNet compares them with the references' (faces.py). Prompt consistency: CLIP
compares picture and prompt (clip_score.py).

    subjects/ann/1.jpg ...     her pictures, one face each; 1.mask.png beside 1.jpg shows where she is (white)
    subjects/ann/word.txt      the word she stands for: woman, man; without the file, person
    prompts.txt                one a line: `a <subject> riding a horse`; a second <subject> is the next subject

A stopped evaluation goes on where it was. The FaceNet file comes from the published VGGFace2 weights; once:

    from facenet_pytorch import InceptionResnetV1; from safetensors.torch import save_file
    save_file(InceptionResnetV1(pretrained="vggface2").state_dict(), "facenet.safetensors")
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from moa_core.binding import Binding
from moa_core.moa_file import load_moa
from moa_core.whole_file import write_whole
from training.data.processes import gathered, processes, share
from training.evaluation.clip_score import ClipJudge
from training.evaluation.faces import FaceJudge
from training.evaluation.fingerprint import fingerprint
from training.evaluation.judges import Judges
from training.evaluation.references import ReferencePerson, read_people
from training.evaluation.report import result_of, table
from training.evaluation.shots import Shot, plan, read_prompts
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
) -> dict:
    """Draws and scores what `out` lacks; returns result.json. Processes share the work. Raises ValueError."""
    base = pipeline.base
    settings = asdict(sampling) | {
        "base": fingerprint(base.unet, base.text_encoder, base.autoencoder),
        "moa": fingerprint(pipeline.moa),
        "prompts": prompts,
        "subjects": {person.name: person.fingerprint for person in people},
    }
    shots = list(plan(people, prompts, images))
    subjects = {person.name: pipeline.encode_subject(person.pixels, person.word, person.masks) for person in people}
    bindings = [shot.bindings([subjects[person.name] for person in shot.people]) for shot in shots]
    _claim(out, settings)
    scores = []
    for number in tqdm(share(range(len(shots))), unit="picture", disable=not processes().is_main_process):
        shot, path = shots[number], out / f"{shots[number].name}.png"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_whole(path, _draw(pipeline, shot, bindings[number], sampling))
        scores.append((number, judges.score(shot, path)))
    in_order = [score for _, score in sorted(gathered(scores), key=itemgetter(0))]
    return result_of(shots, in_order, prompts, settings)


def _claim(out: Path, settings: dict) -> None:
    """Pictures of two settings never mix in one folder."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / SETTINGS
    if path.exists():
        before = json.loads(path.read_text())
        if changed := [name for name, value in settings.items() if before.get(name) != value]:
            raise ValueError(
                f"{out} holds an evaluation with other settings ({', '.join(changed)}): give the same again to go on "
                "with it, or another --out"
            )
    processes().wait_for_everyone()  # until all have looked
    if processes().is_main_process:
        write_whole(path, json.dumps(settings, indent=1).encode())


def _draw(pipeline: MoAPipeline, shot: Shot, bindings: list[Binding], sampling: Sampling) -> bytes:
    """A PNG file."""
    contexts = [pipeline.encode_prompt(text) for text in (shot.prompt, "")]
    options = {"steps": sampling.steps, "cfg": sampling.cfg, "seed": shot.seed(sampling.seed)}
    pictures, _ = pipeline.sample(*contexts, bindings, sparse=False, **options)
    file = io.BytesIO()
    Image.fromarray((pictures[0] * 255).round().byte().numpy()).save(file, "PNG")
    return file.getvalue()


def paper(
    base: Path,
    moa: Path,
    subjects: Path,
    prompts: Path,
    out: Path,
    facenet: Path,
    clip: Path,
    images: int,
    sampling: Sampling,
) -> dict:
    """The whole protocol, from files; writes result.json and result.md. Raises ValueError."""
    if min(images, sampling.steps) < 1:
        raise ValueError(f"--images is {images}, --steps is {sampling.steps}: both must be 1 or more")
    people, texts = read_people(subjects), read_prompts(prompts)
    state = processes()
    judges = Judges(FaceJudge(facenet, state.device), ClipJudge(clip, state.device), people)
    model, mixture = load_base(base), load_moa(moa)
    if mixture.config.base != model.family:
        raise ValueError(f"--moa: {moa} is for the base model {mixture.config.base}, --base holds {model.family}")
    pipeline = MoAPipeline(model.to(state.device), mixture.to(state.device))
    result = evaluate(pipeline, judges, people, texts, out, images, sampling)
    if state.is_main_process:
        write_whole(out / "result.json", json.dumps(result, indent=1).encode())
        write_whole(out / "result.md", (table(result) + "\n").encode())
    return result
