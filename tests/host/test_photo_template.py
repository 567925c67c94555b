"""The templates for everybody's own checkpoint, with a photo and an IP-Adapter or with LoRAs, in a real ComfyUI."""

import pytest
import torch
from image_experts import adapter, picture
from lora_files import random_lora
from PIL import Image
from safetensors.torch import save_file

from toy_world.shape import IMAGE_SIZE
from training.comfyui.templates import FOR_A_PHOTO, read, to_api

SIDE = 128
"""Of the pictures, in pixels: a narrow SDXL has 70 attentions."""


@pytest.mark.parametrize("name", FOR_A_PHOTO)
def test_the_templates_for_photos_run_at_once_on_random_files_of_the_published_layout(
    host, loaded, sdxl, toy_base, tmp_path, name
):
    """A toy checkpoint or a narrow SDXL, random weights in the adapter that the template names, and first the toy
    people that the pack puts where Load Image looks; of two the second is looked at."""
    import folder_paths

    info = {name: {"input": node.INPUT_TYPES()} for name, node in host.nodes.items()}
    api = to_api(read(name), info)
    widgets = {node["class_type"]: node["inputs"] for node in api.values()}
    file = widgets["MoAFromIPAdapter"]["ipadapter_name"].removesuffix(".safetensors")
    unet, checkpoint = (sdxl[0], (*sdxl[1], loaded[2])) if "sdxl" in file else (toy_base.unet, loaded)
    ready = {
        "CheckpointLoaderSimple": checkpoint,
        "MoAFromIPAdapter": (adapter(host, unet, tmp_path, "plus", file),),
    }
    widgets["EmptyLatentImage"].update(width=SIDE, height=SIDE)
    widgets["KSampler"]["steps"] = 3

    def paint():
        return host.run_graph(api, ready, "VAEDecode")[0]

    drawn = paint()
    photo = Image.fromarray((255 * picture()[0]).byte().numpy())
    photo.save(f"{folder_paths.get_input_directory()}/mine.png")
    of_toy, widgets["LoadImage"]["image"] = widgets["LoadImage"]["image"], "mine.png"
    assert drawn.shape == (1, SIDE, SIDE, 3) and (drawn - paint()).abs().max() > 1e-2
    widgets["MoASubjectEncoder"]["word"] = "nobody"  # whom the prompt does not name
    alone = paint()
    widgets["LoadImage"]["image"] = of_toy
    assert torch.equal(alone, paint()) and (drawn - alone).abs().max() > 1e-2


def test_the_template_for_loras_runs_on_random_files_of_the_names_in_it(host, loaded):
    """A toy checkpoint, and random LoRAs of its U-Net and text encoder."""
    info = {name: {"input": node.INPUT_TYPES()} for name, node in host.nodes.items()}
    api = to_api(read("Your LoRAs, your checkpoint"), info)
    subjects = [node["inputs"] for node in api.values() if node["class_type"] == "MoALoRASubject"]
    for seed, subject in enumerate(subjects):
        weights = random_lora(*loaded[:2], seed=seed)
        save_file(weights, host.base / "models/loras" / subject["lora_name"])
    widgets = {node["class_type"]: node["inputs"] for node in api.values()}
    widgets["EmptyLatentImage"].update(width=IMAGE_SIZE, height=IMAGE_SIZE)
    widgets["KSampler"]["steps"] = 4

    def paint(*strengths):
        for subject, strength in zip(subjects, strengths, strict=True):
            subject["strength"] = subject["strength_clip"] = strength
        return host.run_graph(api, {"CheckpointLoaderSimple": loaded}, "VAEDecode")[0]

    none, first, second, both = (paint(*strengths) for strengths in ((0, 0), (1, 0), (0, 1), (1, 1)))
    assert both.shape == (1, IMAGE_SIZE, IMAGE_SIZE, 3)
    for drawn in (none, first, second):
        assert (both - drawn).abs().max() > 1e-2
