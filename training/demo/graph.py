"""A take as ComfyUI runs it."""

from __future__ import annotations

from typing import Any

from toy_world.shape import IMAGE_SIZE
from training.demo.takes import CFG, CHECKPOINT, MOA, STEPS, Take


def graph(take: Take) -> dict[str, Any]:
    """The take as an API workflow."""
    behavior = "fixed" if take.morph else "random"
    nodes = {
        "base": _node("CheckpointLoaderSimple", ckpt_name=CHECKPOINT),
        "moa": _node("MoALoader", moa_name=MOA),
        "patch": _node(
            "MoAPatchModel",
            model=["base", 0],
            clip=["base", 1],
            moa=["moa", 0],
            strength=take.strength,
            start_percent=0.0,
            end_percent=1.0,
            routing="sparse",
        ),
        "positive": _node("CLIPTextEncode", clip=["patch", 1], text=take.prompt),
        "negative": _node("CLIPTextEncode", clip=["patch", 1], text=""),
        "empty": _node("EmptyLatentImage", width=IMAGE_SIZE, height=IMAGE_SIZE, batch_size=take.frames),
        "latent": _node("LatentBatchSeedBehavior", samples=["empty", 0], seed_behavior=behavior),
        "sample": _node(
            "KSampler",
            model=["patch", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["latent", 0],
            seed=take.seed,
            steps=STEPS,
            cfg=CFG,
            sampler_name="euler",
            scheduler="simple",
            denoise=1.0,
        ),
        "decode": _node("VAEDecode", samples=["sample", 0], vae=["base", 2]),
        "save": _node("SaveImage", images=["decode", 0], filename_prefix="moa"),
    }
    everyone = [*take.people, *([take.morph] if take.morph else [])]
    for n, who in enumerate(everyone):
        nodes[f"toy{n}"] = _node("MoAToySubject", seed=who.seed, pose="standing", word=who.word)
        nodes[f"subject{n}"] = _node(
            "MoASubjectEncoder", moa=["moa", 0], image=[f"toy{n}", 0], word=who.word, mask=[f"toy{n}", 1]
        )
    bound = [f"subject{n}" for n in range(len(take.people))]
    if take.morph:
        nodes["morph"] = _node(
            "MoASubjectInterpolate",
            subject_a=["subject0", 0],
            subject_b=["subject1", 0],
            amount=0.5,
            frames=take.frames,
            method="linear",
        )
        bound = ["morph"]
    for n, subject in enumerate(bound):
        nodes["patch"]["inputs"][f"subjects.subject{n}"] = [subject, 0]
    if take.strength:  # the prior has no routers to look at
        nodes["visualize"] = _node(
            "MoARouterVisualizer", model=["patch", 0], samples=["sample", 0], image=["decode", 0]
        )
        nodes["maps"] = _node("PreviewImage", images=["visualize", 0])
    return nodes


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}
