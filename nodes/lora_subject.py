"""LoRA Subject: a LoRA file -> SUBJECT, bound to a word of the prompt."""

import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor

from ..moa_core.subjects.subject import Subject
from .experts.lora_file import LoRAFile, LoRAs, read_lora
from .host.sockets import CATEGORY, MOA_SUBJECT, SEARCHED, names_someone, own_word
from .photos.reference_masks import subject_area


class MoALoRASubject(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoALoRASubject",
            display_name="LoRA Subject",
            category=CATEGORY,
            description=(
                "Binds a LoRA of a person or character to a word of the prompt: it acts where the checkpoint draws "
                "that word, and nowhere else. Several LoRAs, each their own person, in one picture; no masks to draw."
            ),
            search_aliases=[
                "character lora",
                "multiple loras",
                "two characters",
                "two loras",
                "regional lora",
                "lora mask",
                "freefuse",
                "lora bleed",
                "concept bleeding",
                *SEARCHED,
            ],
            inputs=[
                io.Combo.Input(
                    "lora_name",
                    options=folder_paths.get_filename_list("loras"),
                    tooltip="A LoRA of models/loras, for the family of your checkpoint; any kind that Load LoRA reads.",
                ),
                io.String.Input(
                    "word",
                    default="man",
                    tooltip=(
                        "The word of your prompt that this person stands for: man, woman, 1girl. Two subjects with the "
                        "same word take its first and second occurrence."
                    ),
                ),
                io.String.Input(
                    "trigger",
                    default="",
                    tooltip=(
                        "What the LoRA was trained to be called by. This LoRA alone reads it in place of the word; "
                        "keep it out of the prompt. Empty: it reads the word."
                    ),
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="As strength_model of Load LoRA, where this person is.",
                ),
                io.Float.Input(
                    "strength_clip",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    advanced=True,
                    tooltip="As strength_clip of Load LoRA, in how this LoRA alone reads the prompt.",
                ),
                io.Mask.Input(
                    "area",
                    optional=True,
                    tooltip="White where in the new picture this person may appear; scaled to its size. The sure way "
                    "for two people of one word.",
                ),
            ],
            outputs=[MOA_SUBJECT.Output(display_name="SUBJECT", tooltip="For MoA Patch Model or Subject Interpolate.")],
        )

    @classmethod
    def validate_inputs(cls, word: str | None) -> bool | str:
        return names_someone(word)

    @classmethod
    def execute(
        cls,
        lora_name: str,
        word: str,
        trigger: str = "",
        strength: float = 1.0,
        strength_clip: float = 1.0,
        area: Tensor | None = None,
    ) -> io.NodeOutput:
        word = own_word(word, "LoRA Subject")
        path = folder_paths.get_full_path_or_raise("loras", lora_name)
        file = LoRAFile(lora_name, read_lora(path), trigger.strip(), strength, strength_clip)
        subject = Subject(torch.ones(1, 1), word, lora_name, area=subject_area(area), adapter=LoRAs((file,)))
        return io.NodeOutput(subject)
