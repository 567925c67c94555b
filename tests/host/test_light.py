"""What MoA adds to a step: calls, counted; and which layers it leaves alone."""

from collections import Counter

import pytest
import torch
from image_experts import adapter
from launched_calls import Calls

from training.comfyui import PACK

CHECKPOINT, FILE = "moa-toy-base.safetensors", "moa-toy.safetensors"


@pytest.fixture(scope="module")
def shipped(host):
    """MODEL, CLIP and MOA that come with the pack."""
    for folder, name in (("checkpoints", CHECKPOINT), ("moa", FILE)):
        there = host.base / "models" / folder / name
        there.exists() or there.symlink_to(PACK / "models" / folder / name)
    with torch.inference_mode():
        model, clip, _ = host.run("CheckpointLoaderSimple", CHECKPOINT)
        return model, clip, host.run("MoALoader", FILE)[0]


def launched(host, model, clip, steps: int = 6) -> Counter:
    """In the last step's U-Net call, by name."""
    from comfy.patcher_extension import WrappersMP

    counted = []

    def count(executor, *args, **kwargs):
        with Calls() as calls:
            out = executor(*args, **kwargs)
        counted.append(Counter(calls.names))
        return out

    watched = model.clone()
    own = watched.wrappers.setdefault(WrappersMP.DIFFUSION_MODEL, {})
    watched.wrappers[WrappersMP.DIFFUSION_MODEL] = {"counting": [count], **own}  # around all others
    host.sample(watched, host.prompt(clip, "a man on a beach"), host.prompt(clip, ""), steps=steps, size=24)
    return counted[-1]


@pytest.mark.parametrize("kind, most", [("dense", 110), ("sparse", 110), ("image experts", 70)])
def test_a_step_launches_few_calls_more_than_the_priors(host, shipped, toy_base, tmp_path, monkeypatch, kind, most):
    """With the attention that the host takes on a GPU."""
    from comfy.ldm.modules import attention

    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)
    model, clip, moa = shipped
    routing = {"routing": kind} if kind in ("dense", "sparse") else {}
    if not routing:
        moa = adapter(host, toy_base.unet, tmp_path, "plus", "any")
    patched, patched_clip = host.patch(model, clip, moa, host.subject(moa), **routing)
    prior, ours = launched(host, model, clip), launched(host, patched, patched_clip)
    more = ours - prior
    print(kind, f"{ours.total()} for the prior's {prior.total()}:", more.most_common())
    assert 0 < ours.total() - prior.total() <= most
