"""However a sampling is cut into runs, and whatever is done with its latents since: everybody stays who and where."""

import pytest
import torch
import torch.nn.functional as F

PROMPT = "a man and a woman in paris"
STEPS = 4


@pytest.fixture(scope="module")
def couple(host, loaded, each_moa):
    """A patched MODEL with two people, its prompt and a negative one, the plain MODEL."""
    with torch.inference_mode():
        people = [host.subject(each_moa, 1), host.subject(each_moa, 2, "woman")]
        model, clip = host.patch(*loaded[:2], each_moa, *people)
        return model, host.prompt(clip, PROMPT), host.prompt(clip, "bad"), loaded[0]


def part(host, couple, latent, first, last, model=None):
    """KSamplerAdvanced's LATENT; what begins later than with the first step adds no noise."""
    patched, positive, negative, _ = couple
    return host.run(
        "KSamplerAdvanced", model or patched, "disable" if first else "enable", 1, STEPS, 4.0, "euler", "normal",
        positive, negative, latent, first, last, "enable",
    )[0]  # fmt: skip


def empty(batch: int = 1, size: int = 16) -> dict:
    return {"samples": torch.zeros(batch, 4, size, size)}


def in_parts(host, couple, *ends: int, batch: int = 1, model=None) -> dict:
    latent, first = empty(batch), 0
    for last in ends:
        latent, first = part(host, couple, latent, first, last, model), last
    return latent


def apart(a: dict, b: dict) -> float:
    return float((a["samples"] - b["samples"]).abs().max() / b["samples"].abs().max())


def test_halves_thirds_and_single_steps_are_one_run(host, couple):
    whole, plain = in_parts(host, couple, STEPS), in_parts(host, couple, STEPS, model=couple[3])
    shown = host.run("MoARouterVisualizer", couple[0], whole)
    assert apart(whole, plain) > 1e-2
    for ends in ((2, 4), (1, 3, 4), (1, 2, 3, 4)):
        parts = in_parts(host, couple, *ends)
        assert apart(parts, whole) < 1e-3, ends
        for ours, theirs in zip(host.run("MoARouterVisualizer", couple[0], parts), shown, strict=True):
            assert ours.shape == theirs.shape and (ours != theirs).float().mean() < 0.01, ends


def test_a_region_that_is_sampled_step_by_step_in_turn_with_others_goes_on_from_its_own(host, couple):
    """As packs do that sample regions: another MODEL draws the rest, and the latents are put together."""
    plain = couple[3]
    mask = torch.zeros(1, 128, 128)
    mask[..., :32] = 1

    def regional(model):
        latent = empty()
        for step in range(STEPS):
            ours, other = (part(host, couple, latent, step, step + 1, each) for each in (model, plain))
            latent = host.run("LatentCompositeMasked", other, ours, 0, 0, False, mask)[0]
        return latent

    drawn, without = regional(couple[0]), regional(plain)
    seen = couple[0].get_attachment("moa").runs[-1]
    assert apart(drawn, without) > 1e-2
    assert len(seen.trace.timesteps) == STEPS  # the maps of all its steps, not those of the last alone


def test_a_second_pass_begins_with_the_places_of_the_first_scaled_to_its_size(host, couple):
    """As after a hires fix by latent upscale: they are known in its first and only step."""
    model, positive, negative, _ = couple
    first = in_parts(host, couple, STEPS)
    before = host.run("MoARouterVisualizer", model, first)[2]
    for node, *widgets in (
        ("LatentUpscaleBy", "nearest-exact", 1.5), ("LatentUpscaleBy", "bislerp", 2.0),
        ("LatentUpscale", "bilinear", 192, 256, "disabled"), ("LatentUpscaleBy", "area", 1.0),
    ):  # fmt: skip
        larger = host.run(node, first, *widgets)[0]
        overlaps = []
        for latent in (larger, {"samples": 1.02 * larger["samples"]}):  # its result, and what is not known
            second = host.sample(model, positive, negative, steps=1, latent=latent, denoise=0.4, seed=5)
            after = host.run("MoARouterVisualizer", model, second)[2]
            scaled = F.interpolate(before[None], after.shape[-2:], mode="nearest")[0]
            overlaps.append(float((after * scaled).sum() / ((after + scaled) > 0).sum()))
        print(widgets, overlaps)
        assert overlaps[0] > max(0.5, overlaps[1] + 0.1), widgets


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_checkpoints_of_few_steps_show_the_people(host, couple, steps):
    """As LCM, Lightning and Turbo are sampled: without guidance, with their own nodes before and after MoA."""
    patched, positive, negative, plain = couple

    def lcm(model):
        model = host.run("ModelSamplingDiscrete", model, "lcm", False)[0]
        return host.run("KSampler", model, 1, steps, 1.0, "lcm", "sgm_uniform", positive, negative, empty())[0]

    def turbo(model):
        sampler, sigmas = (
            host.run("KSamplerSelect", "euler_ancestral")[0],
            host.run("SDTurboScheduler", model, steps, 1.0)[0],
        )
        return host.run("SamplerCustom", model, True, 1, 1.0, positive, negative, sampler, sigmas, empty())[0]

    for sample in (lcm, turbo):
        drawn = sample(patched)
        assert apart(drawn, sample(plain)) > 1e-2
        assert host.run("MoARouterVisualizer", patched, drawn)[1].any()


@pytest.fixture(scope="module")
def morph(host, loaded, each_moa):
    """A patched MODEL with one subject of three variants, its prompt and a negative one."""
    with torch.inference_mode():
        ends = [host.subject(each_moa, seed) for seed in (1, 2)]
        frames = host.run("MoASubjectInterpolate", *ends, 0.5, 3, "linear")[0]
        model, clip = host.patch(*loaded[:2], each_moa, frames)
        return model, host.prompt(clip, "a man"), host.prompt(clip, "bad"), loaded[0]


def test_frames_taken_out_of_a_batch_are_the_frames_of_the_batch(host, morph):
    model, positive, negative, _ = morph

    def sampled(latent, **options):
        return host.sample(model, positive, negative, latent=latent, steps=2, **options)

    def frames(latent, first, last):
        return {"samples": latent["samples"][first:last]}

    whole = sampled(empty(3))
    two, one = map(sampled, host.run("RebatchLatents", [empty(3)], [2])[0])
    assert apart(two, frames(whole, 0, 2)) < 1e-4 and apart(one, frames(whole, 2, 3)) < 1e-4
    # From one noise: without the subject all frames would be equal.
    fixed = sampled(host.run("LatentBatchSeedBehavior", empty(3), "fixed")[0])
    assert apart(frames(fixed, 1, 2), frames(fixed, 2, 3)) > 1e-3
    cut = sampled(host.run("LatentFromBatch", fixed | empty(3), 1, 2)[0])
    assert apart(cut, frames(fixed, 0, 2)) < 1e-4  # they share their index, and are two frames still
    # A second pass over some of them: by now they are known by what they look like.
    again = sampled(fixed, denoise=0.6, seed=2)
    some = sampled(host.run("LatentFromBatch", fixed, 1, 2)[0], denoise=0.6, seed=2)
    assert apart(some, frames(again, 1, 3)) < 1e-4 < 1e-3 < apart(frames(again, 0, 2), frames(again, 1, 3))
    # One picture that is repeated becomes all frames, as in the batch that it would be without a first pass.
    repeated = host.run("RepeatLatentBatch", sampled(empty()), 3)[0]
    again = sampled(host.run("LatentBatchSeedBehavior", repeated, "fixed")[0])
    assert apart(frames(again, 0, 1), frames(again, 1, 2)) > 1e-3 < apart(frames(again, 1, 2), frames(again, 2, 3))
    # And a sampling whose second half is that of some frames alone.
    halfway = part(host, morph, empty(3), 0, 2)
    rest = part(host, morph, host.run("LatentFromBatch", halfway, 1, 2)[0], 2, 4)
    assert apart(rest, frames(part(host, morph, halfway, 2, 4), 1, 3)) < 1e-4


def shown(host, model, latent: dict) -> list[torch.Tensor]:
    return list(host.run("MoARouterVisualizer", model, latent))


def test_router_visualizer_knows_every_picture_again(host, loaded, moa, caplog):
    """After many other runs, cut out of its batch, put together with another, halved in precision, by another MODEL."""
    people = [host.subject(moa, 1), host.subject(moa, 2, "woman")]
    model, clip = host.patch(*loaded[:2], moa, *people)
    positive, negative = host.prompt(clip, PROMPT), host.prompt(clip, "bad")
    drawn = [host.sample(model, positive, negative, seed=seed, steps=2 + seed % 2, batch=2) for seed in range(8)]
    own = [shown(host, model, latent) for latent in drawn]
    assert not torch.equal(own[0][2], own[2][2]) and not caplog.text
    assert all(torch.equal(a, b) for a, b in zip(shown(host, model, drawn[0]), own[0], strict=True))
    mixed = host.run("LatentBatch", host.run("LatentFromBatch", drawn[3], 1, 1)[0], drawn[4])[0]
    for number, (before, after) in enumerate(zip(own[3], shown(host, model, mixed), strict=True)):
        count = 2 if number == 2 else 1
        assert torch.equal(after[count:, : own[4][number].shape[1], : own[4][number].shape[2]], own[4][number])
        assert torch.equal(after[:count, : before.shape[1], : before.shape[2]], before[count:])
    half = {"samples": drawn[5]["samples"].half()}
    assert torch.equal(shown(host, model, half)[2], own[5][2])
    # MoA Patch Model ran again, KSampler's result is the cache's.
    anew, _ = host.patch(*loaded[:2], moa, *people)
    assert torch.equal(shown(host, anew, drawn[6])[2], own[6][2]) and not caplog.text
    # Changed: the closest, and it says so.
    blended = {"samples": 0.9 * drawn[7]["samples"] + 0.1 * drawn[0]["samples"]}
    assert torch.equal(shown(host, model, blended)[2], own[7][2]) and "the maps are a guess" in caplog.text
    image, area, masks = shown(host, model, empty(2, 10))
    assert "No maps are known" in caplog.text and image.shape[0] == 2
    assert area.shape == (2, 80, 80) and masks.shape == (4, 80, 80) and not area.any() and not masks.any()


def test_of_past_runs_as_many_are_kept_as_fit_and_nobodys_weights(host, couple):
    import gc

    model, positive, negative, _ = couple
    past = host.module("nodes.sampling.past_runs")
    host.sample(model, positive, negative)
    newest = model.get_attachment("moa").runs[-1]
    kept = past.PastRuns(most_bytes=3 * newest.nbytes)
    for _ in range(5):
        kept.add(newest)
    assert len(kept.of(newest.model)) == 3
    kept.add(type(newest)(**vars(newest) | {"samples": torch.zeros(4 * newest.nbytes)}))
    assert len(kept.of(newest.model)) == 1  # the last is kept, however large
    held, seen = [newest], set()
    while held:  # nothing that a past run keeps alive is a subject, or has weights
        thing = held.pop()
        if id(thing) not in seen and not isinstance(thing, type):
            seen.add(id(thing))
            assert not isinstance(thing, torch.nn.Module) and type(thing).__name__ != "Subject"
            held += gc.get_referents(thing)
    assert len(seen) > 100
