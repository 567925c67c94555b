"""Toy Subject: a reference person of the toy world, so that a first graph needs no photo."""

import comfy.model_management as mm
import numpy as np
import torch
from comfy_api.latest import io

from ..toy_world.draw import draw_person, draw_person_pose
from ..toy_world.world import ACTIONS, WORDS, someone
from .host.sockets import CATEGORY


class MoAToySubject(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoAToySubject",
            display_name="Toy Subject",
            category=CATEGORY,
            description=(
                "Draws a cartoon person for the toy model that comes with this pack: another seed is another person. "
                "Connect IMAGE and MASK to Subject Encoder. With a real model, use Load Image and a photo instead."
            ),
            search_aliases=["moa toy", "example person", "reference image", "test subject"],
            inputs=[
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**32 - 1,
                    control_after_generate=True,
                    tooltip="Who it is: skin, hair, face, glasses, beard. The pose changes none of it.",
                ),
                io.Combo.Input("pose", options=list(ACTIONS), tooltip="What the person does in the picture."),
                io.Combo.Input(
                    "word",
                    options=list(WORDS),
                    tooltip="Whom to draw. Enter the same word in Subject Encoder and use it in the prompt.",
                ),
                io.Boolean.Input(
                    "skeleton",
                    default=False,
                    optional=True,
                    tooltip="On: IMAGE shows only how the person stands, for a ControlNet trained on such pictures.",
                ),
            ],
            outputs=[
                io.Image.Output(tooltip="The person before a plain background, or the pose alone."),
                io.Mask.Output(tooltip="White on the person."),
            ],
        )

    @classmethod
    def execute(cls, seed: int, pose: str, word: str, skeleton: bool = False) -> io.NodeOutput:
        framing = "full length" if pose == "riding a bike" else "portrait"
        who = someone(seed, word)
        picture, mask = draw_person(who, word, action=pose, framing=framing)
        if skeleton:
            picture = draw_person_pose(who, word, pose, framing)
        image = torch.from_numpy(np.array(picture)).float() / 255  # [H, W, 3]
        device = mm.intermediate_device()
        return io.NodeOutput(image[None].to(device), torch.from_numpy(mask).float()[None].to(device))
