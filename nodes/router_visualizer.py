"""Router Visualizer: where the routers put the subjects, as a picture and as a mask."""

from collections.abc import Sequence

import comfy.model_management as mm
import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..moa_core.routing.subject_area import two_classes
from .evidence.router_picture import batched, draw_sentences, draw_trace
from .host.messages import Message, NodeText
from .host.sockets import CATEGORY
from .sampling.past_runs import PastRun, Source, closest, made_by
from .sampling.sampling_run import KEY, MoAHooks

PIXELS_PER_LATENT = 8
NOT_SAMPLED = Message(
    "No maps are known for these latents: the masks are empty.",
    "No sampling with MoA of latents of this size is remembered. Connect the LATENT of the KSampler that uses this "
    "MODEL; if it is connected, change the KSampler's seed, so that it samples again.",
)
CHANGED = Message(
    "These latents were changed since: the maps are a guess.",
    "They are not what a sampling with MoA ended with, so Router Visualizer shows the maps of the picture that comes "
    "closest. Connect the LATENT of the KSampler itself for its own.",
)


class MoARouterVisualizer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoARouterVisualizer",
            display_name="Router Visualizer",
            category=CATEGORY,
            description=(
                "Shows what the routers chose while a picture was sampled: the expert's share by layer and timestep, "
                "and the subject area as a mask for inpainting or detailing."
            ),
            search_aliases=["moa mask", "subject mask", "attention map", "router map", "person mask", "face mask"],
            inputs=[
                io.Model.Input("model", tooltip="The patched MODEL that the KSampler used."),
                io.Latent.Input("samples", tooltip="The KSampler's LATENT."),
                io.Image.Input(
                    "image", optional=True, tooltip="The decoded picture; the subject area is drawn over it."
                ),
            ],
            outputs=[
                io.Image.Output(tooltip="The subject area, and the expert's share by layer and timestep."),
                io.Mask.Output(tooltip="White where the subjects are, at the size of the picture."),
                io.Mask.Output(
                    display_name="subject_masks",
                    tooltip="One mask for each subject of MoA Patch Model, in their order, picture by picture.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model: ModelPatcher, samples: dict, image: Tensor | None = None) -> io.NodeOutput:
        hooks: MoAHooks | None = model.get_attachment(KEY)
        if hooks is None:
            raise ValueError(
                "Router Visualizer: this MODEL has no MoA at work. Connect the MODEL output of MoA Patch Model, with a "
                "strength above 0"
            )
        latents = samples["samples"].detach().cpu()
        sources, said = find_runs(hooks.past_runs(), latents)
        NodeText().say(said)
        people = max([hooks.people, *(source[0].people for source in sources if source is not None)])
        size = [PIXELS_PER_LATENT * side for side in latents.shape[-2:]]
        pictures, masks, own_masks = [], [], []
        areas = {run: run.trace.subject_area() for run, _ in filter(None, sources) if run.trace}  # [B, h, w]
        for number, source in enumerate(sources):
            shown = None if image is None else image[number % len(image)]
            if source is None or not source[0].trace:
                sentences = [str(message) for message in said] if source is None else nothing_to_see(source[0])
                pictures.append(draw_sentences(sentences, shown))
                masks.append(torch.zeros(size))
                own_masks.append(torch.zeros(people, *size))
                continue
            run, index = source
            area = areas[run][index]
            pictures.append(draw_trace(run.trace, area, index, shown))
            large = F.interpolate(area[None, None], size, mode="bicubic", align_corners=False)[0, 0]  # [H, W]
            masks.append(two_classes(large))
            owner = F.interpolate(run.owners[index][None, None].float(), size, mode="nearest")[0]  # [1, H, W]
            own_masks.append(masks[-1] * (owner == torch.arange(people).view(-1, 1, 1)))  # [S, H, W]
        out = batched(pictures), torch.stack(masks), torch.cat(own_masks)
        return io.NodeOutput(*(tensor.to(mm.intermediate_device()) for tensor in out))


def nothing_to_see(run: PastRun) -> list[str]:
    """Why a run has no maps."""
    if run.bound:
        return [
            "No router was recorded: MoA was outside start_percent and end_percent in every step, or no step painted "
            "the whole picture at once."
        ]
    nothing = "Nothing was bound: this is the plain checkpoint's picture, without a subject area."
    return [nothing, *(run.missing or ["No subject is connected to MoA Patch Model."])]


def find_runs(runs: Sequence[PastRun], latents: Tensor) -> tuple[list[Source | None], list[Message]]:
    """The picture that each of the latents [B, 4, h, w] is, else the one of their size that comes closest.

    None where no run has any of their size. And what is to be said of that.
    """
    exact = made_by(latents, runs)
    sources = [
        closest(picture, runs) if source is None else source for picture, source in zip(latents, exact, strict=True)
    ]
    if None in sources:
        return sources, [NOT_SAMPLED]
    return sources, [CHANGED] if None in exact else []
