"""InstantID's ControlNet in a real ComfyUI: each person's reads their own image tokens, where others read the text."""

import pytest
import torch
from face_pictures import photo
from image_experts import PROMPT, face_adapter

from moa_core.subjects.face_crop import POINTS
from tests.host.test_faces import ANN, BOB, encoded
from tests.host.test_stacking import controlnet, differ

COLORS = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1]])
BOTH = photo(ANN, BOB)
LEFT, RIGHT = torch.zeros(1, 96, 128), torch.zeros(1, 96, 128)
LEFT[..., :70], RIGHT[..., 70:] = 1, 1


@pytest.fixture(scope="module")
def instantid(host, sdxl, tmp_path_factory):
    with torch.inference_mode():
        return face_adapter(host, sdxl[0], tmp_path_factory.mktemp("instantid"), "unnorm", "instantid")


@pytest.fixture(scope="module")
def net(host, sdxl):
    folder = host.base / "models/controlnet"
    folder.mkdir(exist_ok=True)
    with torch.inference_mode():
        return controlnet(host, sdxl[1][0], folder / "instantid.safetensors")


@pytest.fixture(scope="module")
def text(host, sdxl):
    """A positive and a negative prompt."""
    with torch.inference_mode():
        return host.prompt(sdxl[1][1], PROMPT), host.prompt(sdxl[1][1], "ugly")


@pytest.fixture(scope="module")
def ann(host, instantid):
    with torch.inference_mode():
        return encoded(host, instantid, photo(ANN))


@pytest.fixture(scope="module")
def bob(host, instantid):
    """Two photos: twice as many tokens."""
    with torch.inference_mode():
        return encoded(host, instantid, torch.cat([photo(BOB), photo((BOB[0] - 1, 20, 20, 40))]), "woman")


def applied(host, conditionings, net, subject, face=BOTH, *widgets, **others):
    return host.run("MoAInstantIDControl", *conditionings, net, subject, face, *widgets, **others)


def hint(conditionings) -> torch.Tensor:
    """The picture that the last ControlNet of a chain reads, [P, H, W, 3]."""
    return conditionings[0][0][1]["control"].cond_hint_original.movedim(1, -1)


def by_hand(host, text, net, drawn, instantid, tokens, strength=0.8):
    """The host's own ControlNet, alone, with these tokens as what ControlNets read in place of the text."""
    nobody = instantid.adapter.projector(torch.zeros(1, 512))
    both = host.run("ControlNetApplyAdvanced", *text, net, drawn, strength, 0.0, 1.0)
    return [
        [[embedding, own | {"cross_attn_controlnet": read}] for embedding, own in conditioning]
        for conditioning, read in zip(both, (tokens, nobody), strict=True)
    ]


def control(host, model, conditionings, batch=1) -> torch.Tensor | None:
    """What the U-Net is given in the first step, [2, B, N]: the positive's rows and the negative's. None: nothing."""
    seen = []

    def record(apply_model, call):
        seen.append((call["cond_or_uncond"], call["c"]["control"]))
        return torch.zeros_like(call["input"])

    watched = model.clone()
    watched.set_model_unet_function_wrapper(record)
    host.sample(watched, *conditionings, steps=1, batch=batch)
    ((rows, given),) = seen  # both in one call, as without it
    if given is None:
        return None
    found = torch.cat([t.flatten(1) for part in given.values() for t in part if t is not None], dim=1)
    return found.unflatten(0, (2, -1))[torch.tensor(rows).argsort()]


def test_in_a_chain_each_reads_its_persons_tokens_and_others_the_text(host, sdxl, instantid, net, text, ann, bob):
    """Two people, an ordinary ControlNet before them and one after: the sum of each alone."""
    model, pose = sdxl[1][0], torch.rand(1, 96, 128, 3, generator=torch.Generator().manual_seed(3))
    first = host.run("ControlNetApplyAdvanced", *text, net, pose, 1.0, 0.0, 1.0)
    second = applied(host, first, net, ann, mask=LEFT)
    third = applied(host, second, net, bob, BOTH, 0.5, mask=RIGHT)
    chain = host.run("ControlNetApplyAdvanced", *third, net, 1 - pose, 0.3, 0.0, 1.0)
    alone = [
        control(host, model, each)
        for each in (
            first,
            by_hand(host, text, net, hint(second), instantid, ann.features.unflatten(1, (16, 2048))),
            by_hand(host, text, net, hint(third), instantid, bob.features.unflatten(1, (32, 2048)), 0.5),
            host.run("ControlNetApplyAdvanced", *text, net, 1 - pose, 0.3, 0.0, 1.0),
        )
    ]
    together, expected = control(host, model, chain), sum(alone)
    difference = (together - expected).abs().max() / expected.abs().max()
    print(f"max difference {difference:.1e} of what the ControlNets give")
    assert difference < 1e-5
    with_text = control(host, model, host.run("ControlNetApplyAdvanced", *text, net, hint(second), 0.8, 0.0, 1.0))
    assert all(differ(with_text[row], alone[1][row]) for row in (0, 1))
    last = chain[0][0][1]["control"]
    if hasattr(last.previous_controlnet, "deepclone_multigpu"):  # what the host puts on each of several GPUs
        clone = last.previous_controlnet.deepclone_multigpu(torch.device("cpu"))
        clone.set_previous_controlnet(last.previous_controlnet.previous_controlnet)
        last.set_previous_controlnet(clone)
        torch.testing.assert_close(control(host, model, chain), together)


def test_each_picture_of_a_morph_reads_its_own_tokens(host, sdxl, instantid, net, text, ann):
    cid = encoded(host, instantid, photo((7, 20, 20, 40)))
    morph = host.run("MoASubjectInterpolate", ann, cid, 0.5, 2, "linear")[0]
    conditionings = applied(host, text, net, morph)
    found = control(host, sdxl[1][0], conditionings, batch=2)
    for number, subject in enumerate((ann, cid)):
        tokens = subject.features.unflatten(1, (16, 2048))
        own = by_hand(host, text, net, hint(conditionings), instantid, tokens)
        torch.testing.assert_close(found[:, number], control(host, sdxl[1][0], own, batch=2)[:, number])


def test_a_controlnet_of_another_packs_class_stays_what_it_is(host, sdxl, net, text, ann):
    """Advanced-ControlNet's, for example, copies itself and keeps functions of its own on every object."""
    from comfy.controlnet import ControlNet

    class Halved(ControlNet):
        def __init__(self, network, original):
            super().__init__(network, load_device=original.load_device, manual_cast_dtype=original.manual_cast_dtype)
            original.copy_to(self)
            self.control_model_wrapped = original.control_model_wrapped
            self.control_merge = self.halved

        def copy(self):
            return Halved(self.control_model, self)

        def halved(self, control, before, output_dtype):
            halves = {part: [each / 2 for each in layers] for part, layers in control.items()}
            return ControlNet.control_merge(self, halves, before, output_dtype)

    theirs = Halved(net.control_model, net)
    whole, half = (control(host, sdxl[1][0], applied(host, text, each, ann)) for each in (net, theirs))
    torch.testing.assert_close(half, whole / 2)
    with_text = host.run("ControlNetApplyAdvanced", *text, theirs, BOTH, 1.0, 0.0, 1.0)
    assert theirs.control_model is net.control_model and "moa_tokens_0" not in with_text[0][0][1]["control"].extra_conds


def test_a_frame_cut_out_of_a_morph_reads_its_own_tokens(host, sdxl, instantid, net, text, ann):
    """Sampled alone it is the same picture as in the batch, and not that of another variant."""
    cid = encoded(host, instantid, photo((7, 20, 20, 40)), area=torch.ones(1, 32, 32))
    morph = host.run("MoASubjectInterpolate", cid, ann, 0.5, 3, "linear")[0]
    model, clip = host.patch(*sdxl[1], instantid, morph)
    conditionings = applied(host, (host.prompt(clip, PROMPT), text[1]), net, morph)
    batch = {"samples": torch.zeros(3, 4, 8, 8)}
    together = host.sample(model, *conditionings, steps=1, latent=batch)["samples"]
    cut = host.run("LatentFromBatch", batch, 1, 2)[0]
    alone = host.sample(model, *conditionings, steps=1, latent=cut)["samples"]
    torch.testing.assert_close(alone, together[1:], atol=1e-4 * float(together.abs().max()), rtol=0)
    first = applied(host, (host.prompt(clip, PROMPT), text[1]), net, cid)
    assert differ(host.sample(model, *first, steps=1, latent=cut)["samples"], alone)


def test_it_acts_beside_moa_in_its_part_of_the_sampling_and_strength_0_is_without_it(host, sdxl, instantid, net, text):
    (model, clip), area = sdxl[1], torch.ones(1, 32, 32)
    person = encoded(host, instantid, photo(ANN), area=area)
    patched, bound = host.patch(model, clip, instantid, person)
    own = host.prompt(bound, PROMPT), text[1]
    both = applied(host, own, net, person)
    drawn = [
        host.sample(*graph, steps=1, size=8)["samples"] for graph in ((patched, *both), (patched, *own), (model, *both))
    ]
    assert differ(drawn[0], drawn[1]) and differ(drawn[0], drawn[2])
    assert all(a is b for a, b in zip(applied(host, own, net, person, BOTH, 0.0), own, strict=True))
    later = applied(host, own, net, person, BOTH, 0.8, 0.5)
    assert control(host, model, later) is None and control(host, model, both) is not None


def test_the_points_are_drawn_where_the_face_is_in_every_picture(host, net, text, ann, bob):
    """The largest face, or the one in the mask; the person's own face plays no part."""
    scale = 1280 / 128

    def points(face):
        _, left, top, side = face
        return ((torch.tensor([left, top]) + torch.tensor(POINTS) / 112 * side) * scale).round().long()

    def shown(subject, picture, **others):
        drawn = hint(applied(host, text, net, subject, picture, **others))
        assert drawn.shape[1:] == (960, 1280, 3)
        return drawn

    def at(drawn, face):
        x, y = points(face).T
        return drawn[y, x]

    for picture in shown(bob, torch.cat([BOTH, photo(ANN)])):
        assert torch.equal(at(picture, ANN), COLORS)
        assert at(picture, BOB).max() == 0
    (masked,) = shown(ann, BOTH, mask=RIGHT)
    assert torch.equal(at(masked, BOB), COLORS) and masked[:, :700].max() == 0
    preview = host.nodes["MoAInstantIDControl"].execute(*text, net, ann, BOTH).ui.as_dict()["images"]
    assert len(preview) == 1 and preview[0]["type"] == "temp"


def test_a_loaded_person_takes_the_moa(host, text, net, instantid, ann, toy_base, tmp_path):
    saved = host.nodes["MoASaveSubject"].execute(ann, "ann").ui["subjects"][0]["filename"]
    loaded = host.run("MoALoadSubject", saved)[0]

    def brought(subject, **others):
        return [c[0][1]["model_conds"]["moa_tokens_0"].cond for c in applied(host, text, net, subject, **others)]

    assert all(map(torch.equal, brought(loaded, moa=instantid), brought(ann)))
    with pytest.raises(ValueError, match="'man' on 'subject' is no person of InstantID.*connect that MOA to 'moa'"):
        brought(loaded)
    other = face_adapter(host, toy_base.unet, tmp_path, "unnorm", "other-instantid")
    with pytest.raises(ValueError, match=r"encoded with 'instantid\.bin', and 'moa' is 'other-instantid\.bin'"):
        brought(loaded, moa=other)


def test_what_does_not_fit_is_refused_in_a_sentence(host, loaded, text, net, ann, toy_base, tmp_path, loras):
    faceid = encoded(host, face_adapter(host, toy_base.unet, tmp_path, "portrait", "portrait"), photo(ANN))
    for subject in (faceid, host.subject(None, 1)):
        with pytest.raises(ValueError, match="on 'subject' is no person of InstantID's adapter"):
            applied(host, text, net, subject)
    with pytest.raises(ValueError, match="no face in picture 2 of 'face'. Connect a picture"):
        applied(host, text, net, ann, torch.cat([BOTH, photo()]))
    with pytest.raises(ValueError, match="no face in picture 1 of 'face', or none in the mask"):
        applied(host, text, net, ann, photo(BOB), mask=LEFT)
    toy = controlnet(host, loaded[0], host.base / "models/controlnet/toy.safetensors")
    with pytest.raises(ValueError, match="tokens 2048 wide; it is one that reads text 64 wide"):
        applied(host, text, toy, ann)
    with pytest.raises(ValueError, match="expected a ControlNet for SDXL on 'control_net'.*of another kind"):
        applied(host, text, object(), ann)
