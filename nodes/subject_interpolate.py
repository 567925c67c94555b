"""Subject Interpolate: two subjects -> one between them, or a morph sequence."""

from dataclasses import replace

import torch.nn.functional as F
from comfy_api.latest import io

from ..moa_core.subjects.subject import Subject, interpolate
from .experts.lora_file import LoRAs
from .host.sockets import CATEGORY, MOA_SUBJECT


class MoASubjectInterpolate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoASubjectInterpolate",
            display_name="Subject Interpolate",
            category=CATEGORY,
            description=(
                "Blends two subjects. With frames > 1 the subject holds a whole morph sequence: set the latent's "
                "batch_size to the same number and one KSampler run renders it. LatentBatchSeedBehavior (fixed) "
                "before the KSampler starts all of them from the same noise, so that the scene stays."
            ),
            search_aliases=["moa morph", "blend faces", "mix subjects", "morph", "face morph", "interpolate people"],
            inputs=[
                MOA_SUBJECT.Input("subject_a", tooltip="Where the blend starts; the result binds to its word."),
                MOA_SUBJECT.Input("subject_b", tooltip="Where the blend ends."),
                io.Float.Input(
                    "amount",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="0 is subject_a, 1 is subject_b. Not used when frames is above 1.",
                ),
                io.Int.Input(
                    "frames",
                    default=1,
                    min=1,
                    max=256,
                    tooltip="Variants from a to b, ends included; the n-th picture of the latent batch gets the n-th.",
                ),
                io.Combo.Input(
                    "method",
                    options=["linear", "slerp"],
                    default="linear",
                    tooltip="linear: straight. slerp: along the arc, which keeps the features' strength.",
                ),
            ],
            outputs=[
                MOA_SUBJECT.Output(display_name="SUBJECT", tooltip="For MoA Patch Model; bound to subject_a's word.")
            ],
        )

    @classmethod
    def execute(cls, subject_a: Subject, subject_b: Subject, amount: float, frames: int, method: str) -> io.NodeOutput:
        return io.NodeOutput(interpolate(*_of_one_kind(subject_a, subject_b), amount, frames, method))


def _of_one_kind(a: Subject, b: Subject) -> tuple[Subject, Subject]:
    """Two LoRA subjects as subjects of both LoRAs, each with its own alone; others as they are.

    Raises ValueError for a LoRA subject and one of another kind.
    """
    kinds = [isinstance(subject.adapter, LoRAs) for subject in (a, b)]
    if not any(kinds):
        return a, b
    if not all(kinds):
        lora, other = (a, b) if kinds[0] else (b, a)
        raise ValueError(
            f"Subject Interpolate: '{lora.name}' is a LoRA and '{other.name}' is none; only subjects of one kind can "
            "be blended. Connect two LoRA Subjects, or two subjects of Subject Encoder"
        )
    both = LoRAs((*a.adapter.files, *b.adapter.files))
    start = F.pad(a.features, (0, len(b.adapter.files)))
    end = F.pad(b.features, (len(a.adapter.files), 0))
    return replace(a, features=start, adapter=both), replace(b, features=end, adapter=both)
