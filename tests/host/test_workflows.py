"""The shared workflows in a real ComfyUI server that has nothing but the pack: no model, no picture of its own."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from training.comfyui import PACK, Server, find_comfyui, make_base_directory
from workflows import FILES, pictures_of, read, to_api


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(find_comfyui(), make_base_directory(tmp_path_factory.mktemp("fresh"))) as running:
        yield running


def array(image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255


def test_the_shipped_models_are_in_the_lists(server):
    info = server.get("/object_info")
    assert info["CheckpointLoaderSimple"]["input"]["required"]["ckpt_name"][0] == ["moa-toy-base.safetensors"]
    assert info["MoALoader"]["input"]["required"]["moa_name"][1]["options"] == ["moa-toy.safetensors"]


def test_the_template_browser_lists_every_workflow_with_its_picture(server):
    listed = server.get("/workflow_templates")["ComfyUI-MoA"]
    assert sorted(listed) == [path.stem for path in FILES]
    for path in FILES:
        assert len(server.get(f"/api/workflow_templates/ComfyUI-MoA/{path.stem}.jpg")) > 5000


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_workflow_runs(server, path):
    pictures = pictures_of(server, read(path))
    made = [picture for title, picture in pictures.items() if picture.size == (128, 128)]
    assert len(made) >= 2 and all(array(picture).std() > 0.05 for picture in made)


def test_a_swap_changes_the_person_and_keeps_the_background(server):
    workflow = read(PACK / "workflows/moa_subject_swap.json")
    pictures = pictures_of(server, workflow)
    a, b = (array(pictures[title]) for title in ("Subject A", "Subject B"))
    api = to_api(workflow)
    masks = []
    for node, content in list(api.items()):
        if content["class_type"] == "MoAPatchModel":
            sampler = next(
                n for n, c in api.items() if c["class_type"] == "KSampler" and c["inputs"]["model"] == [node, 0]
            )
            inputs = {"model": [node, 0], "samples": [sampler, 0]}
            api[f"area{node}"] = {"class_type": "MoARouterVisualizer", "inputs": inputs}
            api[f"picture{node}"] = {"class_type": "MaskToImage", "inputs": {"mask": [f"area{node}", 1]}}
            api[f"mask{node}"] = {"class_type": "PreviewImage", "inputs": {"images": [f"picture{node}", 0]}}
            masks.append(f"mask{node}")
    entry = server.queue(api)
    subject = np.zeros((128, 128), bool)
    for node in masks:
        subject |= array(Image.open(io.BytesIO(server.pictures(entry, node)[0])))[..., 0] > 0.5
    change = np.abs(a - b).mean(axis=2)
    inside, outside = float(change[subject].mean()), float(change[~subject].mean())
    print(f"swap: inside {inside:.4f}, outside {outside:.4f}, ratio {outside / inside:.3f}")
    assert 0.02 < subject.mean() < 0.9
    assert inside > 0.02 and outside / inside < 0.5


def test_toy_subjects_are_told_apart_by_seed_alone(host):
    def draw(seed, pose="standing", word="man"):
        image, mask = host.run("MoAToySubject", seed, pose, word)
        assert image.shape == (1, 128, 128, 3) and mask.shape == (1, 128, 128)
        return image[0], mask[0]

    image, mask = draw(4)
    assert torch.equal(image, draw(4)[0]) and 0.1 < mask.mean() < 0.9
    assert all(not torch.equal(image, draw(seed)[0]) for seed in range(4))
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    background = image[mask == 0]
    assert (background - background.median(dim=0).values).abs().max() < 0.5  # plain, but for edges
    skins = {
        tuple((draw(4, pose)[0][30:60, 50:78].reshape(-1, 3).median(dim=0).values * 255).int().tolist())
        for pose in ("standing", "waving")
    }
    assert len(skins) == 1
