"""MoA Report: what MoA did to a picture, as figures that can be shown to others."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import comfy.model_management as mm
import comfyui_version
import folder_paths
import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui
from torch import Tensor

from ..moa_core.files.whole_file import write_whole
from ..moa_core.subjects.subject import Subject
from .evidence.likeness import compared, encoder_of, likeness
from .evidence.report_text import report_text
from .evidence.used_files import used_files
from .experts.loaded_photomaker import LoadedPhotoMaker
from .experts.lora_file import LoRAs
from .host.messages import show_on_node
from .host.sockets import CATEGORY
from .router_visualizer import MoARouterVisualizer
from .sampling.past_runs import made_by
from .sampling.run_notes import RunNotes
from .sampling.sampling_run import KEY, MoAHooks

FILE_PREFIX = "MoA_report"


class MoAReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoAReport",
            display_name="MoA Report",
            category=CATEGORY,
            description=(
                "Measures what MoA did: where each subject is, how much it is like its reference, what changed outside "
                "of the subjects, and which of a batch is the best. Shows the text, and saves it as JSON in the output "
                "folder. It holds no prompt, no picture and no folder."
            ),
            search_aliases=[
                "likeness",
                "similarity",
                "best of batch",
                "measure",
                "compare",
                "check files",
                "bug report",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL of MoA Patch Model that the KSampler used."),
                io.Latent.Input("samples", tooltip="The LATENT of that KSampler."),
                io.Image.Input("image", tooltip="Its decoded picture, or a batch of them."),
                io.Image.Input(
                    "image_without",
                    tooltip="The same graph's picture at strength 0: a second KSampler of the same seed with the "
                    "checkpoint's own MODEL.",
                ),
            ],
            outputs=[io.String.Output(display_name="report", tooltip="The text that the node shows.")],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model: ModelPatcher, samples: dict, image: Tensor, image_without: Tensor) -> io.NodeOutput:
        hooks: MoAHooks | None = model.get_attachment(KEY)
        if hooks is None:
            raise ValueError(
                "MoA Report: this MODEL has no MoA at work. Connect the MODEL output of MoA Patch Model, with a "
                "strength above 0"
            )
        latents = samples["samples"]
        _check_pictures(len(latents), image, image_without)
        image, image_without = image[..., :3].float().cpu(), image_without[..., :3].float().cpu()
        places = _places(model, samples, hooks, tuple(image.shape[1:3]))  # [B, S, H, W]
        sources = made_by(latents.detach().cpu(), hooks.past_runs())
        numbers = [number if source is None else source[0].numbers[source[1]] for number, source in enumerate(sources)]
        pictures = _measure(hooks, image, image_without, places, numbers)
        notes = sources[0] and sources[0][0].notes
        report = {
            "format": "moa-report",
            "format_version": 1,
            "versions": {"comfyui": comfyui_version.__version__, "moa": pack_version(), "torch": torch.__version__},
            "device": mm.get_torch_device_name(mm.get_torch_device()),
            "settings": _settings(hooks, notes, image),
            "seconds_per_step": {
                "with": notes and notes.seconds(with_moa=True),
                "without": notes and notes.seconds(with_moa=False),
            },
            "timed_steps": {
                "with": notes.steps(with_moa=True) if notes else 0,
                "without": notes.steps(with_moa=False) if notes else 0,
            },
            "subjects": [
                {
                    "number": number,
                    "word": subject.word,
                    "kind": _kind(subject),
                    "likeness_by": compared(subject, encoder_of(subject, hooks.moa)),
                }
                for number, subject in zip(hooks.sockets, hooks.subjects, strict=True)
            ],
            "pictures": pictures,
            "best": best_of(pictures),
            "files": used_files(cls.hidden and cls.hidden.prompt, cls.hidden and cls.hidden.unique_id),
        }
        text = report_text(report)
        path = _new_path()
        write_whole(path, json.dumps(report, indent=2).encode())
        show_on_node(text)
        saved = ui.SavedResult(path.name, "", io.FolderType.output)
        return io.NodeOutput(text, ui={"text": [text], "reports": [saved]})


def best_of(pictures: list[dict[str, Any]]) -> int | None:
    """The number of the picture in which no subject is far less alike than in its own best one.

    So it does not matter that faces and image features have other scales. One that is not found counts as not alike at
    all; None where no subject has a likeness in any picture.
    """
    by_subject = zip(*([found["likeness"] for found in picture["subjects"]] for picture in pictures), strict=True)
    measured = [likenesses for likenesses in by_subject if any(each is not None for each in likenesses)]
    if not measured:
        return None
    alike = torch.tensor([[-1.0 if each is None else each for each in own] for own in measured])  # [S, B]
    behind = alike.amax(dim=1, keepdim=True) - alike
    return pictures[int(behind.amax(dim=0).argmin())]["number"]


def _check_pictures(count: int, image: Tensor, image_without: Tensor) -> None:
    """Raises a ValueError where the pictures are not those of the latents, or not of one size."""
    if len(image) != count:
        raise ValueError(
            f"MoA Report: image has {len(image)} pictures, samples has {count}. Connect the pictures that VAE Decode "
            "makes of the same LATENT"
        )
    if image_without.shape[:3] != image.shape[:3]:
        found, wanted = (f"{len(i)} of {i.shape[2]}x{i.shape[1]}" for i in (image_without, image))
        raise ValueError(
            f"MoA Report: image_without has other pictures ({found}) than image ({wanted}). Connect those of the same "
            "graph, with the same seed, size and batch, at strength 0"
        )


def _places(model: ModelPatcher, samples: dict, hooks: MoAHooks, size: tuple[int, int]) -> Tensor:
    """[B, S, H, W]: 1 where a subject is, as Router Visualizer has it, in the order of hooks.subjects."""
    _, _, masks = MoARouterVisualizer.execute(model, samples).result  # [B * people, H', W']
    masks = masks.unflatten(0, (len(samples["samples"]), -1)).float().cpu()[:, hooks.sockets]
    return F.interpolate(masks, size, mode="nearest")


def _measure(
    hooks: MoAHooks, image: Tensor, without: Tensor, places: Tensor, numbers: list[int]
) -> list[dict[str, Any]]:
    """What is found in each picture [B, H, W, 3]; places: [B, S, H, W]; numbers: of the pictures in the whole batch."""
    alike = []
    for number, subject in enumerate(hooks.subjects):
        encoder = encoder_of(subject, hooks.moa)
        own = places[:, number]
        alike.append([None] * len(image) if encoder is None else likeness(subject, encoder, image, own, numbers))
    changed = (image - without).abs().mean(dim=3)  # [B, H, W]
    pictures = []
    for n, place in enumerate(places):
        inside = place.amax(dim=0) > 0 if len(place) else torch.zeros_like(changed[n], dtype=torch.bool)
        found = [
            {"box": _box(own), "share": float(own.mean()), "likeness": alike[number][n]}
            for number, own in enumerate(place)
        ]
        pictures.append(
            {
                "number": n + 1,
                "change_inside": _mean(changed[n][inside]),
                "change_outside": _mean(changed[n][~inside]),
                "subjects": found,
            }
        )
    return pictures


def _box(place: Tensor) -> list[float] | None:
    """left, top, right, bottom of a place [H, W], in parts of the picture; None for an empty one."""
    rows, columns = place.any(dim=1).nonzero().flatten(), place.any(dim=0).nonzero().flatten()
    if len(rows) == 0:
        return None
    height, width = place.shape
    edges = columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height
    return [round(float(edge), 4) for edge in edges]


def _mean(values: Tensor) -> float | None:
    return float(values.mean()) if len(values) else None


def _settings(hooks: MoAHooks, notes: RunNotes | None, image: Tensor) -> dict[str, Any]:
    return {
        "strength": hooks.strength,
        "start_percent": hooks.start_percent,
        "end_percent": hooks.end_percent,
        "routing": "sparse" if hooks.sparse else "dense",
        **(notes.settings if notes else {}),
        "width": image.shape[2],
        "height": image.shape[1],
    }


def _kind(subject: Subject) -> str:
    """What the subject appears by."""
    if subject.adapter is None:
        return "MoA"
    if isinstance(subject.adapter, LoRAs):
        return "LoRA"
    return "PhotoMaker" if isinstance(subject.adapter, LoadedPhotoMaker) else "IP-Adapter"


@cache
def pack_version() -> str:
    project = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    return re.search(r'^version = "(.+)"$', project, re.MULTILINE)[1]


def _new_path() -> Path:
    """A file beside the pictures, with a number that no report has yet."""
    folder, name, number, *_ = folder_paths.get_save_image_path(FILE_PREFIX, folder_paths.get_output_directory())
    return Path(folder, f"{name}_{number:05}_.json")
