"""The shared workflows in a real ComfyUI server that has nothing but the pack: no model, no picture of its own."""

import io
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import torch
from PIL import Image
from toy_models import SHIPPED

from toy_world.draw import draw_scene
from toy_world.shape import IMAGE_SIZE
from toy_world.world import ACTIONS, WORDS, sample_scene
from training.comfyui import NAME, PACK
from training.comfyui.templates import ENDING, NAMES, read

EXAMPLE, OTHER = "moa-toy-person.png", "moa-toy-man.png"


def pixels(image: Image.Image) -> np.ndarray:
    """[H, W, 3] from 0 to 1."""
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255


def test_the_toy_models_are_in_the_loaders_lists(fresh_server):
    info = fresh_server.get("/object_info")
    assert info["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"][0] == ["moa-toy-base.safetensors"]
    assert info["MoALoader"]["input"]["required"]["moa_name"][1]["options"] == ["moa-toy.safetensors"]


def test_the_packs_folders_come_after_all_of_the_users(host, tmp_path, monkeypatch):
    import folder_paths

    own, extra = host.base / "models", tmp_path / "extra"
    extensions = folder_paths.folder_names_and_paths["checkpoints"][1]
    known = {kind: ([str(own / kind)], extensions) for kind in ("checkpoints", "controlnet", "loras")}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)
    kinds = (*known, "moa")
    for kind in kinds:  # as extra_model_paths.yaml does, before custom nodes are loaded
        folder_paths.add_model_folder_path(kind, str(extra / kind))
    host.module("nodes.host.folders").add_model_folders()
    for kind in kinds:
        *users, last = folder_paths.get_folder_paths(kind)
        assert last == str(PACK / "models" / kind)
        assert sorted(users) == sorted([str(own / kind), str(extra / kind)])
    mine = extra / SHIPPED[1]
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"")
    assert folder_paths.get_full_path("moa", mine.name) == str(mine)


def test_the_template_browser_lists_every_workflow_with_its_picture(fresh_server):
    """Under a name that no other pack has: the frontend's search stops at a second one."""
    assert sorted(fresh_server.get("/workflow_templates")[NAME]) == [name + ENDING for name in NAMES]
    for name in (name + ENDING for name in NAMES):
        thumbnail = Image.open(io.BytesIO(fresh_server.get(f"/api/workflow_templates/{NAME}/{quote(name)}.jpg")))
        assert thumbnail.format == "JPEG" and thumbnail.width == thumbnail.height


def test_toy_people_are_where_the_templates_look_for_photos_and_replace_nobodys_picture(
    host, fresh_server, tmp_path, monkeypatch, caplog
):
    import folder_paths

    listed = fresh_server.get("/object_info")["LoadImage"]["input"]["required"]["image"][0]
    shown = {node["widgets_values"][0] for name in NAMES for node in read(name)["nodes"] if node["type"] == "LoadImage"}
    assert shown == set(listed) == {EXAMPLE, OTHER}
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path))
    add_example_photos = host.module("nodes.host.example_photo").add_example_photos
    (tmp_path / EXAMPLE).write_bytes(b"somebody's own")
    add_example_photos()
    assert {path.name for path in tmp_path.iterdir()} == {EXAMPLE, OTHER}
    assert (tmp_path / EXAMPLE).read_bytes() == b"somebody's own"
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path / EXAMPLE))  # where nothing can be
    add_example_photos()
    assert str(tmp_path / EXAMPLE / EXAMPLE) in caplog.text and "Choose a photo of your own" in caplog.text


def draw(host, seed, pose="standing", word="man"):
    """IMAGE [1, H, W, 3] and MASK [1, H, W] of Toy Subject."""
    image, mask = host.run("MoAToySubject", seed, pose, word)
    assert image.shape == (1, IMAGE_SIZE, IMAGE_SIZE, 3) and mask.shape == (1, IMAGE_SIZE, IMAGE_SIZE)
    return image[0], mask[0]


@pytest.mark.parametrize("word", WORDS)
def test_a_toy_subject_is_its_seed(host, word):
    pictures = [draw(host, seed, word=word)[0] for seed in range(12)]
    for i, picture in enumerate(pictures):
        assert torch.equal(picture, draw(host, i, word=word)[0])
    differences = torch.stack([(a - b).abs().mean() for i, a in enumerate(pictures) for b in pictures[:i]])
    assert differences.min() > 0 and differences.median() > 0.05
    draw(host, 2**32 - 1, word=word)  # the widget's last seed


def test_a_toy_subjects_pose_is_not_who_it_is(host):
    standing, *others = (draw(host, 4, pose)[0] for pose in ACTIONS if pose != "riding a bike")
    top, bottom, left, right = (round(side * IMAGE_SIZE / 128) for side in (40, 76, 52, 76))
    face = slice(top, bottom), slice(left, right)
    assert all(torch.equal(other[face], standing[face]) and not torch.equal(other, standing) for other in others)


@pytest.mark.parametrize("pose", ACTIONS)
def test_a_toy_subjects_skeleton_is_how_it_stands_and_not_who_it_is(host, pose):
    image, mask = host.run("MoAToySubject", 4, pose, "man", skeleton=True)
    assert torch.equal(mask[0], draw(host, 4, pose)[1])
    bones = image[0].amax(dim=2) > 0.5
    assert 0.01 < bones.float().mean() < 0.5 * mask.mean()
    in_hand = pose not in ("standing", "waving")  # what they hold or ride is no part of the mask
    assert mask[0][bones].mean() > (0.7 if in_hand else 0.95)
    others = [host.run("MoAToySubject", 4, other, "man", skeleton=True)[0] for other in ACTIONS if other != pose]
    assert all((image - other).abs().mean() > 1e-3 for other in others)


@pytest.mark.parametrize("pose", ACTIONS)
def test_a_toy_subjects_mask_covers_the_person(host, pose):
    image, mask = draw(host, 4, pose)
    assert set(mask.unique().tolist()) == {0.0, 1.0} and 0.02 < mask.mean() < 0.9
    background = image[0, 0]
    person = (image - background).abs().amax(dim=2) > 0.1
    assert person[mask > 0].float().mean() > 0.9
    if pose in ("standing", "waving"):  # nothing in hand: all that is drawn is the person, but for smoothed edges
        assert person[mask == 0].float().mean() < 0.03


def test_drawing_a_toy_subject_needs_nothing_beyond_numpy_and_pillow():
    code = "import sys, toy_world.draw, toy_world.world; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=PACK, capture_output=True, text=True, check=True)
    assert not {"torch", "diffusers", "accelerate", "torchvision", "transformers"} & set(loaded.stdout.split())


def test_the_preview_while_sampling_has_the_pictures_colours(host):
    """ComfyUI's own Latent2RGB with the toy family's colours; after a new autoencoder: training.toy latent-rgb."""
    import latent_preview

    family = host.module("nodes.host.toy_family").ToyLatents
    previewer = latent_preview.Latent2RGBPreviewer(family.latent_rgb_factors, family.latent_rgb_factors_bias)
    vae = host.run("CheckpointLoaderSimple", Path(SHIPPED[0]).name)[2]
    shown, drawn = [], []
    for seed in range(8):
        picture = draw_scene(sample_scene(np.random.default_rng([1, seed])), IMAGE_SIZE)[0]
        latents = vae.encode(torch.from_numpy(pixels(picture))[None])
        shown.append(pixels(previewer.decode_latent_to_preview(latents)))
        drawn.append(pixels(picture.resize((IMAGE_SIZE // 8,) * 2, Image.Resampling.BOX)))
    likeness = np.corrcoef(np.ravel(shown), np.ravel(drawn))[0, 1]
    print(f"correlation of the previews with the pictures: {likeness:.2f}")
    assert likeness > 0.6
