"""Subject Encoder's `face`: photos cut to the face by ComfyUI's own landmarker, whose weights are planted here."""

import pytest
import torch
from face_pictures import photo
from image_experts import face_adapter
from planted_landmarker import landmarker_weights
from safetensors.torch import save_file

ANN, BOB = (80, 90, 20, 20), (160, 16, 40, 40)
"""Two faces: four times how large, where, and how large."""
FILE = "mediapipe_face_fp32.safetensors"
LOADER = "LoadMediaPipeFaceLandmarker"


@pytest.fixture(scope="module")
def landmarker(host):
    """The host's, by its own node."""
    if LOADER not in host.nodes:
        pytest.skip("this ComfyUI has no face landmarker")
    folder = host.base / "models/detection"
    folder.mkdir(exist_ok=True)
    with torch.inference_mode():
        save_file(landmarker_weights(), folder / FILE)
        return host.run(LOADER, FILE)[0]


def encoded(host, moa, picture, **widgets):
    return host.run("MoASubjectEncoder", moa, picture, "man", **widgets)[0].features


def square(host, landmarker, picture, largest: int = 0, distance: str = "short") -> tuple[slice, slice]:
    """Rows and columns of the square round a face that the host's own node finds."""
    from moa_core.subjects.head_crop import head_square

    found = host.run("MediaPipeFaceLandmarker", landmarker, picture, distance, 0, 0.5, "empty")
    faces = sorted(zip(found[1][0], found[0]["frames"][0], strict=True), key=lambda face: -face[0]["width"])
    top, left, side = head_square(torch.from_numpy(faces[largest][1]["landmarks_xy"]), picture.shape[1:3])
    height, width = picture.shape[1:3]
    top, left = min(max(top, 0), height - side), min(max(left, 0), width - side)
    return slice(top, top + side), slice(left, left + side)


def test_a_photo_is_cut_to_its_largest_face_or_the_largest_in_the_mask(host, landmarker, moa, ip_moa):
    """A MOA that greys what is not the person still does; an IP-Adapter sees what is behind them."""
    picture, mask = photo(ANN, BOB), torch.zeros(1, 96, 128)
    red = picture[..., 0] == 1
    picture += 0.2 * torch.rand(1, 96, 128, 1) * ~red[..., None]
    mask[:, 10:60, 80:120] = 1
    for who, largest, own in ((BOB, 0, None), (ANN, 1, mask)):
        rows, columns = square(host, landmarker, picture, largest)
        _, left, top, side = who
        assert rows.start < top - side / 5 and rows.stop > top + side * 1.1  # more above than below
        assert columns.start < left - side / 5 and columns.stop > left + side * 1.2
        cut = picture[:, rows, columns]
        assert red[:, rows, columns].sum() == side**2 and cut.shape[1] == cut.shape[2] < 2 * side
        own_cut = None if own is None else own[:, rows, columns]
        for kind, shown in ((ip_moa, None), (moa, own_cut)):
            found = encoded(host, kind, picture, mask=own, face=True)
            torch.testing.assert_close(found, encoded(host, kind, cut, mask=shown))
            assert not torch.allclose(found, encoded(host, kind, picture, mask=own), atol=1e-3)


def test_a_face_far_away_is_found_where_there_is_none_nearby(host, landmarker, ip_moa, caplog):
    """By the host's other detector, for longer distances; its faces are blue here."""
    far = photo((4 * 24, 120, 60, 24), size=(144, 192)).flip(-1)
    blue = far[..., 2] == 1
    rows, columns = square(host, landmarker, far, distance="full")
    cut = far[:, rows, columns]
    assert blue[:, rows, columns].sum() == blue.sum() and cut.shape[1] == cut.shape[2] < 2 * 24
    assert rows.start < 60 - 24 / 5 and rows.stop > 84 and columns.start < 120 - 24 / 5 and columns.stop > 144 + 24 / 5
    torch.testing.assert_close(encoded(host, ip_moa, far, face=True), encoded(host, ip_moa, cut))
    both = far.clone()
    both[:, 40:80, 40:80] = photo((107, 0, 0, 40))[:, :40, :40]  # 4 times 40 of 192, as 128 show it
    rows, columns = square(host, landmarker, both)
    nearby = both[:, rows, columns]
    assert (nearby[..., 0] == 1).sum() == 40**2 and not (nearby[..., 2] == 1).any()
    torch.testing.assert_close(encoded(host, ip_moa, both, face=True), encoded(host, ip_moa, nearby))
    assert not caplog.text


def test_no_face_and_several_are_said_and_without_one_it_is_as_without_the_switch(host, landmarker, ip_moa, caplog):
    tall = [photo(*people, size=(128, 96)) for people in ((BOB,), (), (BOB, (80, 60, 100, 20)))]
    together = encoded(host, ip_moa, torch.cat(tall), face=True)
    assert "No face in picture 2: not cut to it." in caplog.text and "A tall photo" in caplog.text
    assert "Several faces in picture 3: the largest is taken." in caplog.text
    apart = [encoded(host, ip_moa, each, face=number != 1) for number, each in enumerate(tall)]
    torch.testing.assert_close(together, torch.cat(apart).mean(dim=0, keepdim=True))
    caplog.clear()
    encoded(host, ip_moa, tall[0], face=True)
    assert not caplog.text


def test_a_faceid_file_cuts_by_itself_and_needs_no_landmarker(host, toy_base, tmp_path, monkeypatch):
    import folder_paths

    portrait = face_adapter(host, toy_base.unet, tmp_path, "portrait", "ip-adapter-faceid-portrait-switch_sd15")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "detection", ([str(tmp_path)], {".safetensors"}))
    found = [encoded(host, portrait, photo(BOB), face=face) for face in (False, True)]
    assert torch.equal(*found)


def test_what_is_missing_is_named_and_where_it_goes(host, ip_moa, tmp_path, monkeypatch):
    """The folder may hold other detectors, and the landmarker under another name."""
    import folder_paths

    if LOADER in host.nodes:
        monkeypatch.setitem(folder_paths.folder_names_and_paths, "detection", ([str(tmp_path)], {".safetensors"}))
        save_file({"backbone.weight": torch.ones(2)}, tmp_path / "a-detector.safetensors")
        (tmp_path / "cut.safetensors").write_bytes(b"short")
        with pytest.raises(ValueError, match=rf"not in models/detection\. Put {FILE} from https://huggingface"):
            encoded(host, ip_moa, photo(BOB), face=True)
        save_file(landmarker_weights(), tmp_path / "renamed.safetensors")
        renamed = encoded(host, ip_moa, photo(BOB), face=True)
        assert not torch.allclose(renamed, encoded(host, ip_moa, photo(BOB)), atol=1e-3)
        (tmp_path / FILE).write_bytes(b"short")
        with pytest.raises(ValueError, match=rf"'{FILE}' in models/detection is damaged.*get {FILE} from"):
            encoded(host, ip_moa, photo(BOB), face=True)
    else:
        with pytest.raises(ValueError, match=r"this ComfyUI does not have\. Update ComfyUI \(to 0\.23"):
            encoded(host, ip_moa, photo(BOB), face=True)
