"""A file that training/README.md's own commands made, in MoA Loader and all that comes after it."""

import shutil

import torch


def test_moa_loader_takes_the_file_and_it_draws(host, loaded, from_nothing):
    shutil.copy(from_nothing / "runs/mine/moa-mine.safetensors", host.base / "models/moa")
    moa = host.run("MoALoader", "moa-mine.safetensors")[0]
    model, clip, _ = loaded
    prompt, negative = "a woman on a beach", host.prompt(clip, "")
    drawn = []
    for seed in (0, 1):
        patched, patched_clip = host.patch(model, clip, moa, host.subject(moa, seed, "woman"))
        drawn.append(host.sample(patched, host.prompt(patched_clip, prompt), negative)["samples"])
    plain = host.sample(model, host.prompt(clip, prompt), negative)["samples"]
    assert drawn[0].isfinite().all() and not torch.equal(drawn[0], plain) and not torch.equal(*drawn)
