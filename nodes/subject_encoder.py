"""Subject Encoder: reference pictures of one person -> SUBJECT."""

from collections.abc import Sequence

import comfy.model_management as mm
import comfy.utils
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..moa_core.subjects.subject import Subject
from .experts.loaded_ip_adapter import LoadedFaceAdapter, LoadedIPAdapter
from .experts.loaded_moa import LoadedMoA
from .experts.loaded_photomaker import LoadedPhotoMaker
from .host.messages import NodeText
from .host.sockets import CATEGORY, KEEP_PREVIEW, MOA, MOA_SUBJECT, SEARCHED, names_someone, own_word
from .photos.faces import face_doubts, mean_face
from .photos.landmarker import NOT_CUT, CutPhoto, cut_to_face, face_landmarker
from .photos.reference_masks import doubts, reference_masks, subject_area

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
                "face well visible, background masked out. A batch is several pictures of the same person. The node "
                "shows what it encodes."
            ),
            search_aliases=["moa subject", "reference image", "encode person", *SEARCHED],
            inputs=[
                MOA.Input("moa", tooltip="From MoA Loader, MoA From IP-Adapter or MoA From PhotoMaker."),
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
                    tooltip=(
                        "White on the person; the rest is left out. Load Image's MASK is the background: put "
                        "InvertMask between. An all-black mask counts as none."
                    ),
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip="How much of this person comes through: 0 is the plain word, 1 as trained.",
                ),
                io.Mask.Input(
                    "area",
                    optional=True,
                    tooltip="White where in the new picture this person may appear; scaled to its size. The sure way "
                    "for two people of one word.",
                ),
                io.Boolean.Input(
                    "face",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Cuts each picture to its largest face (the largest in the mask), hair and chin in it. For "
                    "IP-Adapter plus-face files, for example. Reads mediapipe_face_fp32.safetensors in "
                    "models/detection; ComfyUI 0.23 or later. FaceID files cut by themselves: no effect.",
                ),
            ],
            **KEEP_PREVIEW,
            outputs=[MOA_SUBJECT.Output(display_name="SUBJECT", tooltip="For MoA Patch Model or Subject Interpolate.")],
        )

    @classmethod
    def validate_inputs(cls, word: str | None) -> bool | str:
        return names_someone(word)

    @classmethod
    def execute(
        cls,
        moa: LoadedMoA | LoadedIPAdapter | LoadedPhotoMaker,
        image: Tensor,
        word: str,
        mask: Tensor | None = None,
        weight: float = 1.0,
        area: Tensor | None = None,
        face: bool = False,
    ) -> io.NodeOutput:
        word = own_word(word, "Subject Encoder")
        masks = reference_masks(image, mask)
        photos = list(zip(image[..., :3], masks, strict=True))
        by_face = isinstance(moa, LoadedFaceAdapter)  # it looks for faces itself
        cuts = _cut_to_faces(photos) if face and not by_face else [None] * len(photos)
        for number, cut in enumerate(cuts):
            if cut is not None:  # who sees what is behind people sees all of the square
                photos[number] = cut.picture, None if moa.sees_middle else cut.mask
        progress = comfy.utils.ProgressBar(len(photos))
        features, shown, seen = [], [], []
        for start in range(0, len(photos), PICTURES_AT_ONCE):
            mm.throw_exception_if_processing_interrupted()
            prepared = [moa.prepare(*photo) for photo in photos[start : start + PICTURES_AT_ONCE]]
            with_face = [each for each in prepared if each is not None]
            shown += map(moa.show, with_face)
            if with_face:
                features.append(moa.encode(with_face))
            seen += prepared
            progress.update(len(prepared))
        whole = any(own is None and cut is None for own, cut in zip(masks, cuts, strict=True))
        said = doubts(image, mask, masks, moa.sees_middle and whole)
        if by_face:
            said += face_doubts(seen)
        elif face:
            said += face_doubts(cuts, NOT_CUT)
        NodeText().say(said)
        if not features:
            raise ValueError(
                f"Subject Encoder: there is no face in the picture of '{word}'"
                f"{'' if mask is None else ', or none in the mask'}, and '{moa.name}' knows people by the face. Use a "
                "photo with the face large and well lit"
            )
        feature = moa.together(torch.cat(features))  # [1, F]
        if not feature.isfinite().all():
            raise ValueError(
                f"Subject Encoder: the features of '{word}' hold NaN or infinite numbers. Either the picture does "
                f"(connect another), or '{moa.name}' is damaged (download it again)"
            )
        adapter = None if isinstance(moa, LoadedMoA) else moa
        own_face = mean_face([each for each in seen if each is not None]) if by_face else None
        subject = Subject(feature, word, word, weight, subject_area(area), moa.encoder, adapter, own_face)
        return io.NodeOutput(subject, ui=ui.PreviewImage(torch.stack(shown)))


def _cut_to_faces(photos: Sequence[tuple[Tensor, Tensor | None]]) -> list[CutPhoto | None]:
    """Pictures [H, W, 3] with their masks [H, W]; None for each without a face."""
    landmarker, cuts = face_landmarker(), []
    for photo in photos:
        mm.throw_exception_if_processing_interrupted()
        cuts.append(cut_to_face(landmarker, *photo))
    return cuts
