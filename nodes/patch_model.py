"""MoA Patch Model: MODEL and CLIP in, MODEL and CLIP out, with subjects."""

from __future__ import annotations

from dataclasses import replace

import comfy.sd
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..moa_core.adapters.ip_adapter_file import SDXL
from ..moa_core.address import BlockShape
from ..moa_core.routing.trace import TIMESTEPS
from ..moa_core.subjects.subject import Subject
from .experts.adapters import adapters_of
from .experts.loaded_ip_adapter import LoadedIPAdapter
from .experts.loaded_moa import LoadedMoA
from .experts.loaded_photomaker import LoadedPhotoMaker
from .host.attention_layers import own_modules, unet_blocks
from .host.messages import Message, NodeText
from .host.sockets import CATEGORY, MOA, MOA_SUBJECT, SEARCHED
from .prompt.clip_binding import bind_subjects
from .prompt.text_towers import text_towers
from .sampling.sampling_run import KEY, MoAHooks

OTHERS = (LoadedIPAdapter, LoadedPhotoMaker)
"""MOAs that others have trained: their subjects carry them along."""
AnyMoA = LoadedMoA | LoadedIPAdapter | LoadedPhotoMaker
MOST_SUBJECTS = 8
NO_SUBJECT = Message(
    "No subject is connected: MoA adds nobody.", "Connect a Subject Encoder or a LoRA Subject to MoA Patch Model."
)
TWO_MOAS = Message(
    "This MODEL already has a MoA.",
    "One MoA carries up to 8 subjects: connect them all to one MoA Patch Model, and connect the MODEL from before it "
    "here",
)


class MoAPatchModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoAPatchModel",
            display_name="MoA Patch Model",
            category=CATEGORY,
            description=(
                "Puts subjects into whatever the checkpoint draws. Place it like a LoRA, between the loaders and the "
                "rest; write the prompt in an ordinary CLIPTextEncode and name each subject by its word: "
                "'a man and a woman in Paris'."
            ),
            search_aliases=["apply moa", "personalize", *SEARCHED],
            inputs=[
                io.Model.Input("model", tooltip="The checkpoint's MODEL; LoRAs may come before or after."),
                io.Clip.Input("clip", tooltip="The checkpoint's CLIP."),
                MOA.Input(
                    "moa",
                    optional=True,
                    tooltip="From MoA Loader, MoA From IP-Adapter or MoA From PhotoMaker. LoRA subjects alone need "
                    "none.",
                ),
                io.Autogrow.Input(
                    "subjects",
                    template=io.Autogrow.TemplatePrefix(
                        input=MOA_SUBJECT.Input(
                            "subject",
                            tooltip="The n-th subject with a word takes that word's n-th occurrence in the prompt.",
                        ),
                        prefix="subject",
                        min=0,
                        max=MOST_SUBJECTS,
                    ),
                    optional=True,  # as `moa` before it: the host shows sockets that may stay open behind the others
                    tooltip="From Subject Encoder or LoRA Subject; up to 8.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Share of the personalized attention: 0 is the plain checkpoint, 1 as trained.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="MoA begins at this part of the sampling. Later keeps more of the composition.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="MoA ends at this part of the sampling.",
                ),
                io.Combo.Input(
                    "routing",
                    options=["sparse", "dense"],
                    default="sparse",
                    advanced=True,
                    tooltip="sparse: after the first steps, only where the subjects are; faster, and keeps more of the "
                    "rest. dense: everywhere, as in the paper.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="For the KSampler, and for Router Visualizer."),
                io.Clip.Output(tooltip="For the CLIPTextEncode of the positive prompt: it notes where the words are."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        clip: comfy.sd.CLIP,
        moa: AnyMoA | None = None,
        subjects: dict | None = None,
        strength: float = 1.0,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        routing: str = "sparse",
    ) -> io.NodeOutput:
        text = NodeText()
        if model.get_attachment(KEY) is not None:
            text.say([TWO_MOAS])
            raise ValueError(f"MoA Patch Model: {TWO_MOAS}")
        connected = {int(socket.removeprefix("subject")): s for socket, s in (subjects or {}).items() if s is not None}
        sockets = sorted(connected)  # there may be gaps: a Subject Encoder between others is muted
        people = [_with_adapter(f"subject{n} ('{connected[n].name}')", connected[n], moa) for n in sockets]
        chosen = [who.twin() if who in people[:n] else who for n, who in enumerate(people)]
        for used in dict.fromkeys([moa, *(s.adapter for s in chosen if isinstance(s.adapter, OTHERS))]):
            if used is not None:
                _check_fit(model, clip, used)
        _check_unet(model, clip)
        patched = model.clone()
        bound = bind_subjects(clip.clone(), chosen)
        messages = [] if chosen else [NO_SUBJECT]
        if strength > 0.0:
            with own_modules(model):
                adapters, beside, left_out = adapters_of(model, clip, chosen)
            messages += left_out
            learned, timesteps = None, TIMESTEPS
            if isinstance(moa, LoadedMoA):
                learned, timesteps = moa.mixture.model, moa.timesteps
                beside.append(moa.mixture.clone())
            hooks = MoAHooks(
                chosen,
                strength,
                start_percent,
                end_percent,
                routing == "sparse",
                learned,
                adapters,
                text,
                timesteps,
                sockets,
                bound.binder,
                moa if isinstance(moa, LoadedMoA) else None,
            )
            hooks.attach(patched, *beside)
        text.say(messages)
        return io.NodeOutput(patched, bound)


def _with_adapter(which: str, subject: Subject, moa: AnyMoA | None) -> Subject:
    """The subject as this MODEL is to show it; one that carries no adapter appears by the MOA that is connected.

    Raises a ValueError where there is none, or another one than the subject was made with.
    """
    if subject.adapter is not None:
        return subject
    if moa is None:
        raise ValueError(
            f"MoA Patch Model: {which} appears by a MOA, and none is connected. Connect the MOA it was encoded with "
            f"({'not known' if subject.encoder is None else subject.encoder.moa}); LoRA subjects alone need none"
        )
    _check_subject(which, subject, moa)
    return replace(subject, adapter=moa) if isinstance(moa, OTHERS) else subject


def _check_unet(model: ModelPatcher, clip: comfy.sd.CLIP) -> None:
    """Raises a ValueError for a MODEL or a CLIP of a kind that words cannot be found in."""
    family = type(model.model.model_config).__name__
    if not unet_blocks(model):
        raise ValueError(
            f"MoA Patch Model: this MODEL is {family} (no U-Net with text attention). MoA works with SD 1.5 and SDXL "
            "checkpoints: load one of those"
        )
    if not text_towers(clip):
        raise ValueError(
            f"MoA Patch Model: the CLIP is a {type(clip.cond_stage_model).__name__}, in which MoA finds no words. "
            "Connect the CLIP of the same checkpoint as the MODEL"
        )


def _check_fit(model: ModelPatcher, clip: comfy.sd.CLIP, moa: AnyMoA) -> None:
    """Raises a ValueError that names both sides where MoA and model do not fit."""
    found = unet_blocks(model)
    family = type(model.model.model_config).__name__
    if not moa.fits(found):
        raise ValueError(
            f"MoA Patch Model: '{moa.name}' is for {moa.base} ({_describe(moa.shapes)}), but this MODEL is "
            f"{family} ({_describe(list(found.values()))}). Load a checkpoint of {moa.base}, or a MoA or an IP-Adapter "
            "made for this one"
        )
    towers = text_towers(clip)
    if sum(tower.tokenizer.embedding_size for tower in towers) != moa.shapes[0].context_dim:
        raise ValueError(
            f"MoA Patch Model: the CLIP is a {type(clip.cond_stage_model).__name__}, but {moa.base} reads the text of "
            f"{'CLIP-L and CLIP-G' if moa.base == SDXL else 'one CLIP-L'}. Connect the CLIP of the same checkpoint as "
            "the MODEL"
        )


def _check_subject(which: str, subject: Subject, moa: AnyMoA) -> None:
    """Raises a ValueError that names both MoAs where another image encoder than this one's made the subject."""
    if subject.encoder is not None and subject.encoder != moa.encoder:
        raise ValueError(
            f"MoA Patch Model: {which} was encoded with '{subject.encoder.moa}', and the '{moa.name}' connected here "
            f"has another image encoder. Encode the person's picture with '{moa.name}', or load "
            f"'{subject.encoder.moa}' instead"
        )
    if not moa.reads(subject.features.shape[-1]):
        raise ValueError(
            f"MoA Patch Model: {which} has features of width {subject.features.shape[-1]}, '{moa.name}' reads "
            f"{moa.feature_dim}. Encode it with the same MoA"
        )


def _describe(shapes: list[BlockShape]) -> str:
    if not shapes:
        return "no U-Net with text attention"
    widths = sorted({shape.dim for shape in shapes})
    return f"{len(shapes)} transformer blocks, {'/'.join(map(str, widths))} wide, text {shapes[0].context_dim} wide"
