"""Subject Encoder: reference pictures of one person -> SUBJECT."""

import logging

import comfy.model_management as mm
import comfy.utils
import torch
import torch.nn.functional as F
from comfy_api.latest import io
from torch import Tensor

from ..moa_core.reference import prepare_reference
from ..moa_core.subject import Subject
from .loader import LoadedMoA
from .sockets import CATEGORY, MOA, MOA_SUBJECT

PICTURES_AT_ONCE = 8


class MoASubjectEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MoASubjectEncoder",
            display_name="Subject Encoder",
            category=CATEGORY,
            description=(
                "Turns reference pictures of one person into a subject for MoA Patch Model. Best: one person, "
                "face well visible, background masked out. A batch is several pictures of the same person."
            ),
            search_aliases=["moa subject", "reference image", "face reference", "encode person"],
            inputs=[
                MOA.Input("moa", tooltip="From MoA Loader."),
                io.Image.Input("image", tooltip="One picture of the person, or a batch of pictures of the same one."),
                io.String.Input(
                    "word",
                    default="man",
                    tooltip=(
                        "The word of your prompt that this person stands for: man, woman, person. Two subjects with "
                        "the same word take its first and second occurrence."
                    ),
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="White on the person; the rest is left out. An all-black mask counts as none.",
                ),
            ],
            outputs=[MOA_SUBJECT.Output(display_name="SUBJECT")],
        )

    @classmethod
    def execute(cls, moa: LoadedMoA, image: Tensor, word: str, mask: Tensor | None = None) -> io.NodeOutput:
        word = word.strip()
        if not word:
            raise ValueError(
                "Subject Encoder: 'word' is empty. Enter the word of your prompt that names the person: man"
            )
        masks = _masks(image, mask)
        mm.load_models_gpu([moa.image_encoder])
        encoder, device = moa.moa.image_encoder, moa.image_encoder.load_device
        dtype = next(encoder.parameters()).dtype
        progress = comfy.utils.ProgressBar(len(image))
        features = []
        for start in range(0, len(image), PICTURES_AT_ONCE):
            mm.throw_exception_if_processing_interrupted()
            pictures = image[start : start + PICTURES_AT_ONCE, ..., :3]
            own_masks = masks[start : start + PICTURES_AT_ONCE]
            prepared = [prepare_reference(p, m, encoder.size) for p, m in zip(pictures, own_masks, strict=True)]
            features.append(encoder(torch.stack(prepared).to(device, dtype)).float().cpu())
            progress.update(len(pictures))
        feature = torch.cat(features).mean(dim=0, keepdim=True)  # [1, F]
        if not feature.isfinite().all():
            raise ValueError(
                f"Subject Encoder: the features of '{word}' hold NaN or infinite numbers. Either the picture does "
                f"(connect another), or '{moa.name}' is damaged (download it again)"
            )
        return io.NodeOutput(Subject(feature, word, word))


def _masks(image: Tensor, mask: Tensor | None) -> list[Tensor | None]:
    """One mask [H, W] or None for every picture of image [P, H, W, 3 or 4]."""
    count, height, width, channels = image.shape
    if mask is None:
        if channels < 4:
            return [None] * count
        logging.info("MoA: the reference picture has an alpha channel; it serves as the mask.")
        mask = image[..., 3]
    if mask.ndim == 2:
        mask = mask[None]
    if mask.shape[0] not in (1, count):
        raise ValueError(
            f"Subject Encoder: {mask.shape[0]} masks for {count} pictures. Connect one mask, or one for each picture"
        )
    if mask.shape[1:] != (height, width):
        logging.info(
            "MoA: the mask is %dx%d, the picture %dx%d; the mask is scaled.", *mask.shape[:0:-1], width, height
        )
        mask = F.interpolate(mask[:, None].float(), (height, width), mode="bilinear", align_corners=False)[:, 0]
    masks = [m if bool((m > 0.5).any()) else None for m in mask.expand(count, -1, -1)]
    if None in masks:  # LoadImage hands out black masks for pictures without transparency
        logging.info("MoA: an all-black mask counts as none; the whole reference picture is used.")
    return masks
