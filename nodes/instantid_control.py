"""InstantID ControlNet: a person's image tokens and five face points -> CONDITIONING."""

from __future__ import annotations

import torch
from comfy.controlnet import ControlNet
from comfy_api.latest import io, ui
from torch import Tensor

from ..moa_core.adapters.ip_adapter_file import ANTELOPE
from ..moa_core.address import block_shapes
from ..moa_core.subjects.face_points import draw_face_points
from ..moa_core.subjects.subject import Subject
from .experts.loaded_ip_adapter import LoadedFaceAdapter
from .experts.own_context import apply_with_tokens
from .host.messages import NodeText
from .host.sockets import CATEGORY, KEEP_PREVIEW, MOA, MOA_SUBJECT, SEARCHED
from .photos.faces import Face, face_doubts
from .photos.reference_masks import reference_masks


class MoAInstantIDControl(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoAInstantIDControl",
            display_name="InstantID ControlNet",
            category=CATEGORY,
            description=(
                "Applies InstantID's ControlNet for one person: it reads that person's image tokens where other "
                "ControlNets read the text, and puts the face where the face of a picture is. One such node for each "
                "person, one after the other; other ControlNets may come before or after. For research only, as "
                "InstantID is."
            ),
            search_aliases=["instant id", "identitynet", "controlnet", "face pose", "face keypoints", *SEARCHED],
            inputs=[
                io.Conditioning.Input("positive", tooltip="The prompt, from CLIPTextEncode or another ControlNet."),
                io.Conditioning.Input("negative", tooltip="The negative prompt, from there as well."),
                io.ControlNet.Input("control_net", tooltip="From Load ControlNet Model: InstantID's, for SDXL."),
                MOA_SUBJECT.Input(
                    "subject",
                    tooltip="The person: from Subject Encoder, with the MOA of InstantID's adapter. Connect it to MoA "
                    "Patch Model as well.",
                ),
                io.Image.Input(
                    "face",
                    tooltip="A picture with a face where the person's is to be, as it is to be turned; anybody's. Best "
                    "in the proportions of the new picture.",
                ),
                io.Float.Input(
                    "strength",
                    default=0.8,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="How much the ControlNet adds: 0 is without it, 0.8 as InstantID's authors use it.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="The ControlNet begins at this part of the sampling.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="The ControlNet ends at this part of the sampling.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White on the face to take, where 'face' shows several. Open: the largest.",
                ),
                MOA.Input(
                    "moa",
                    optional=True,
                    tooltip="For a subject from Load Subject alone: the MOA of InstantID's adapter.",
                ),
            ],
            **KEEP_PREVIEW,
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="For the KSampler, or the next ControlNet."),
                io.Conditioning.Output(display_name="negative", tooltip="For the KSampler, or the next ControlNet."),
            ],
            is_experimental=True,
        )

    @classmethod
    def execute(
        cls,
        positive: list,
        negative: list,
        control_net: ControlNet,
        subject: Subject,
        face: Tensor,
        strength: float = 0.8,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        mask: Tensor | None = None,
        moa: LoadedFaceAdapter | None = None,
    ) -> io.NodeOutput:
        loaded = _instantid(subject, moa)
        nobody = loaded.adapter.mixture.negative  # [n, D]
        _check_control(control_net, nobody.shape[-1])
        drawn = torch.stack([draw_face_points(f.points, face.shape[1:3]) for f in _faces(loaded, face, mask)])
        if strength > 0:
            tokens = subject.features.unflatten(-1, (-1, nobody.shape[-1]))  # [V, T, D]
            nothing = nobody.repeat(tokens.shape[1] // len(nobody), 1)[None]  # as many, or the rows would not batch
            sides = (positive, tokens), (negative, nothing)
            positive, negative = apply_with_tokens(control_net, drawn, strength, (start_percent, end_percent), *sides)
        return io.NodeOutput(positive, negative, ui=ui.PreviewImage(drawn))


def _instantid(subject: Subject, moa: object) -> LoadedFaceAdapter:
    """The MOA that a subject's tokens are of. Raises ValueError where that is not InstantID's."""
    loaded = moa if subject.adapter is None else subject.adapter
    if not (isinstance(loaded, LoadedFaceAdapter) and loaded.adapter.faces == ANTELOPE):
        raise ValueError(
            f"InstantID ControlNet: '{subject.name}' on 'subject' is no person of InstantID's adapter, whose tokens "
            "this ControlNet reads. Encode the person with MoA From IP-Adapter and InstantID's adapter (a file with "
            "'instantid' in its name); for a person from Load Subject, connect that MOA to 'moa'"
        )
    if subject.encoder not in (None, loaded.encoder) or not loaded.reads(subject.features.shape[-1]):
        made_with = "another file" if subject.encoder is None else f"'{subject.encoder.moa}'"
        raise ValueError(
            f"InstantID ControlNet: '{subject.name}' on 'subject' was encoded with {made_with}, and 'moa' is "
            f"'{loaded.name}'. Connect the MOA that the person was encoded with, or encode the person anew"
        )
    return loaded


def _check_control(control_net: object, width: int) -> None:
    """Raises ValueError for what is no ControlNet with an attention to tokens of that width."""
    network = getattr(control_net, "control_model", None)
    shapes = {} if network is None else block_shapes(network.state_dict())
    widths = {shape.context_dim for shape in shapes.values()}
    if widths != {width}:
        found = f"one that reads text {widths.pop()} wide" if widths else "of another kind"
        raise ValueError(
            f"InstantID ControlNet: expected a ControlNet for SDXL on 'control_net', which reads tokens {width} wide; "
            f"it is {found}. Choose InstantID's in Load ControlNet Model: the ControlNetModel of "
            "huggingface.co/InstantX/InstantID"
        )


def _faces(loaded: LoadedFaceAdapter, pictures: Tensor, mask: Tensor | None) -> list[Face]:
    """The face of each of the pictures [P, H, W, 3]. Raises ValueError where there is none."""
    masks = reference_masks(pictures, mask)
    found = [loaded.prepare(picture[..., :3], own) for picture, own in zip(pictures, masks, strict=True)]
    if None in found:
        raise ValueError(
            f"InstantID ControlNet: there is no face in picture {found.index(None) + 1} of 'face'"
            f"{'' if mask is None else ', or none in the mask'}. Connect a picture with a face, large and well lit"
        )
    NodeText().say(face_doubts(found))
    return found
