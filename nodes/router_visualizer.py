"""Router Visualizer: where the routers put the subjects, as a picture and as a mask."""

import torch
import torch.nn.functional as F
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from torch import Tensor

from ..moa_core.routing.subject_area import two_classes
from .router_picture import draw_sentences, draw_trace
from .sampling_run import KEY, MoAHooks, PastRun
from .sockets import CATEGORY

PIXELS_PER_LATENT = 8


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
        hooks = model.get_attachment(KEY)
        run = _find_run(hooks, samples["samples"])
        people = hooks.people
        count = len(run.samples)
        images = [None if image is None else image[i % len(image)] for i in range(count)]
        size = [PIXELS_PER_LATENT * side for side in run.samples.shape[-2:]]
        if not run.trace:
            sentences = nothing_to_see(run)
            pictures = torch.stack([draw_sentences(sentences, picture) for picture in images])
            return io.NodeOutput(pictures, torch.zeros(count, *size), torch.zeros(count * people, *size))
        area = run.trace.subject_area()  # [B, h, w]
        pictures = [draw_trace(run.trace, area[i], i, images[i]) for i in range(count)]
        large = F.interpolate(area[:, None], size, mode="bicubic", align_corners=False)[:, 0]  # [B, H, W]
        masks = torch.stack([two_classes(m) for m in large])
        owner = F.interpolate(run.owners[:, None].float(), size, mode="nearest")  # [B, 1, H, W]
        own_masks = masks[:, None] * (owner == torch.arange(people).view(-1, 1, 1))  # [B, S, H, W]
        return io.NodeOutput(torch.stack(pictures), masks, own_masks.flatten(0, 1))


def nothing_to_see(run: PastRun) -> list[str]:
    """Why a run has no maps."""
    if run.bound:
        return [
            "No router was recorded: MoA was outside start_percent and end_percent in every step, or no step painted "
            "the whole picture at once."
        ]
    nothing = "Nothing was bound: this is the plain checkpoint's picture, without a subject area."
    return [nothing, *(run.missing or ["No subject is connected to MoA Patch Model."])]


def _find_run(hooks: MoAHooks | None, latents: Tensor) -> PastRun:
    """The run that made these latents; the newest of their size where none did exactly."""
    if hooks is None:
        raise ValueError(
            "Router Visualizer: this MODEL has no MoA at work. Connect the MODEL output of MoA Patch Model, with a "
            "strength above 0"
        )
    fitting = [run for run in reversed(hooks.runs) if run.samples.shape == latents.shape]
    if not fitting:
        raise ValueError(
            f"Router Visualizer: no sampling of latents {list(latents.shape)} with this MODEL was recorded. Connect "
            "the LATENT of a KSampler that uses the same MODEL, and sample again (change its seed) if it was cached"
        )
    same = (run for run in fitting if torch.allclose(run.samples.to(latents), latents.cpu(), atol=1e-3))
    return next(same, fitting[0])
