"""MoA Report: its figures are those of the pictures, and it tells nothing that is nobody's business."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

PROMPT = "a man and a woman in paris"


def report_of_pasted(host, model, latents, *photos: tuple[torch.Tensor, ...]) -> tuple[dict, str]:
    """The report, and its text, on pictures that show photos [1, H, W, 3] of subjects where these are found."""
    masks = host.run("MoARouterVisualizer", model, latents)[2].unflatten(0, (len(photos), -1))  # [B, S, H, W]
    image = torch.full((len(masks), *masks.shape[2:], 3), 0.5)
    for picture, places, shown in zip(image, masks, photos, strict=True):
        for place, photo in zip(places, shown, strict=True):
            rows, columns = (place.any(dim=dim).nonzero().flatten() for dim in (1, 0))
            box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
            size = picture[box].shape[:2]
            picture[box] = F.interpolate(photo.movedim(-1, 1), size, mode="nearest-exact")[0].movedim(0, -1)
    text, told = report(host, model, latents, image, image)
    return told, text


@pytest.fixture
def drawn(host, loaded, each_moa):
    """MODEL, LATENT, two pictures with two people and the same without MoA, who are subject0 and subject2."""
    model, clip, vae = loaded
    people = {"subject0": host.subject(each_moa, 1), "subject2": host.subject(each_moa, 2, "woman")}
    patched, patched_clip = host.run("MoAPatchModel", model, clip, each_moa, people, start_percent=0.4)
    positive, negative = host.prompt(patched_clip, PROMPT), host.prompt(patched_clip, "")
    latents, plain = (host.sample(m, positive, negative, steps=6, batch=2) for m in (patched, model))
    pictures = (vae.decode(latent["samples"]) for latent in (latents, plain))
    return patched, latents, *pictures


def report(host, *inputs):
    """The newest report's text, and what its file holds."""
    before = reports(host)
    (text,) = host.run("MoAReport", *inputs)
    (new,) = reports(host) - before
    return text, json.loads(new.read_text(encoding="utf-8"))


def reports(host) -> set:
    import folder_paths

    return set((host.base / folder_paths.get_output_directory()).glob("MoA_report_*"))


def test_places_and_changes_are_those_of_the_pictures(host, each_moa, drawn):
    model, latents, image, without = drawn
    text, told = report(host, *drawn)
    masks = host.run("MoARouterVisualizer", model, latents)[2].unflatten(0, (2, -1))[:, [0, 2]]  # [B, S, H, W]
    assert masks.any() and [(s["number"], s["word"]) for s in told["subjects"]] == [(0, "man"), (2, "woman")]
    by = None if each_moa is None else "image features"
    assert [subject["likeness_by"] for subject in told["subjects"]] == [by, by]
    assert ("it was made of no photo" in text, "by image features" in text) == (by is None, by is not None)
    changed = (image - without).abs().mean(dim=3)
    for picture, own, change in zip(told["pictures"], masks, changed, strict=True):
        inside = own.amax(dim=0) > 0
        assert picture["change_inside"] == pytest.approx(float(change[inside].mean()), rel=1e-4)
        assert picture["change_outside"] == pytest.approx(float(change[~inside].mean()), rel=1e-4)
        for found, mask in zip(picture["subjects"], own, strict=True):
            assert found["share"] == pytest.approx(float(mask.mean()), abs=1e-6)
            assert (found["likeness"] is None) == (each_moa is None or not mask.any())
            if mask.any():
                left, top, right, bottom = found["box"]
                height, width = mask.shape
                cut = mask[round(top * height) : round(bottom * height), round(left * width) : round(right * width)]
                assert cut.sum() == mask.sum() and cut[0].any() and cut[-1].any() and cut[:, 0].any()
            else:
                assert found["box"] is None


def test_who_is_painted_as_in_the_reference_is_as_like_as_can_be_and_the_best(host, moa, ip_moa, loaded):
    """Subjects made of the second picture's own places: its likeness is 1, the first one's less."""
    model, clip, vae = loaded
    for kind in (moa, ip_moa):
        patched, patched_clip = host.patch(model, clip, kind, host.subject(kind, 1))
        positive, negative = host.prompt(patched_clip, "a man in paris"), host.prompt(patched_clip, "")
        latents = host.sample(patched, positive, negative, steps=3, batch=2)
        image = vae.decode(latents["samples"])
        place = host.run("MoARouterVisualizer", patched, latents)[2][1:]
        assert place.any()
        own = host.run("MoASubjectEncoder", kind, image[1:], "man", place)[0].features
        hooks = patched.get_attachment("moa")
        hooks.subjects = [dataclasses.replace(hooks.subjects[0], features=own)]
        text, told = report(host, patched, latents, image, image)
        first, second = (picture["subjects"][0]["likeness"] for picture in told["pictures"])
        assert second == pytest.approx(1.0, abs=1e-4) and (first is None or first < second - 1e-4)
        assert told["best"] == 2 and "Picture 2 of 2, the best" in text and "Picture 1 of 2\n" in text
        assert told["pictures"][1]["change_inside"] == 0.0


@pytest.mark.parametrize(("likenesses", "best"), [
    ([(0.40, 0.38), (0.70, 0.95)], 2),  # one by the face, whose cosines are smaller, one by image features
    ([(None, 0.3), (0.9, 0.7)], 2),
    ([(0.5, 0.4), (None, None)], 1),
    ([(None, None), (None, None)], None),
])  # fmt: skip
def test_the_best_is_where_nobody_is_far_behind_their_own_best(host, likenesses, best):
    """likenesses: of each subject in two pictures."""
    pictures = [{"number": n + 1, "subjects": [{"likeness": own[n]} for own in likenesses]} for n in range(2)]
    assert host.module("nodes.report").best_of(pictures) == best
    assert host.module("nodes.report").best_of([{"number": 1, "subjects": []}]) is None


@pytest.mark.parametrize(("kind", "start", "area", "known"), [
    ("ip_moa", 0.0, None, {"with": 5, "without": 1}),  # one of the two of the scouting
    ("ip_moa", 0.0, torch.ones(1, 16, 16), {"with": 5}),
    ("moa", 0.5, None, {"with": 3, "without": 2}),
    ("moa", 1.0, None, {"without": 5}),
])  # fmt: skip
def test_it_says_what_it_knows_of_the_steps_and_what_it_does_not(host, loaded, request, kind, start, area, known):
    """A run notes its steps' times, with MoA at work and without."""
    (model, clip, vae), used = loaded, request.getfixturevalue(kind)
    subject = host.subject(used, 1, area=area)
    patched, patched_clip = host.patch(model, clip, used, subject, start_percent=start, strength=0.7)
    positive, negative = host.prompt(patched_clip, "a man in paris"), host.prompt(patched_clip, "")
    latents = host.sample(patched, positive, negative, steps=6, cfg=3.0)
    image = vae.decode(latents["samples"])
    text, told = report(host, patched, latents, image, image)
    assert {name for name, value in told["seconds_per_step"].items() if value is not None} == known.keys()
    assert told["timed_steps"] == {"with": 0, "without": 0} | known
    assert ("without it not known" in text) == ("without" not in known)
    asked = {"strength": 0.7, "start_percent": start, "sampler": "euler", "steps": 6, "cfg": 3.0, "width": 128}
    assert asked.items() <= told["settings"].items()
    changed = {"samples": latents["samples"] + 1.0}  # no run made it: places are a guess, times are not known
    assert report(host, patched, changed, image, image)[1]["seconds_per_step"] == {"with": None, "without": None}


def test_what_does_not_belong_together_is_refused_in_a_sentence(host, moa, loaded):
    model, clip, _ = loaded
    patched, _ = host.patch(model, clip, moa, host.subject(moa, 1))
    latents = {"samples": torch.zeros(2, 4, 16, 16)}
    image = torch.zeros(2, 128, 128, 3)
    with pytest.raises(ValueError, match="MoA Report: this MODEL has no MoA at work"):
        host.run("MoAReport", model, latents, image, image)
    with pytest.raises(ValueError, match="image has 1 pictures, samples has 2.*VAE Decode"):
        host.run("MoAReport", patched, latents, image[:1], image[:1])
    with pytest.raises(
        ValueError, match=r"image_without has other pictures \(1 of 128x128\).*2 of 128x128.*strength 0"
    ):
        host.run("MoAReport", patched, latents, image, image[:1])


def test_a_disk_that_is_full_leaves_no_half_report(host, moa, loaded, monkeypatch):
    model, clip, vae = loaded
    patched, patched_clip = host.patch(model, clip, moa, host.subject(moa, 1))
    positive, negative = host.prompt(patched_clip, "a man in paris"), host.prompt(patched_clip, "")
    latents = host.sample(patched, positive, negative, steps=2)
    image, before = vae.decode(latents["samples"]), reports(host)

    def full(path, content):
        with path.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError("No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        host.run("MoAReport", patched, latents, image, image)
    left = [path for path in (host.base / "output").iterdir() if path.suffix == ".json"]
    assert reports(host) == before == set(left)
