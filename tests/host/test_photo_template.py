"""The template for everybody's own photo, checkpoint and IP-Adapter, in a real ComfyUI."""

import torch
from image_experts import adapter, picture
from PIL import Image

from toy_world.shape import IMAGE_SIZE
from training.comfyui.templates import read, to_api


def test_the_template_for_photos_runs_on_random_files_of_the_published_layout(host, loaded, toy_base, tmp_path):
    """A toy checkpoint, and random weights in the adapter that it names."""
    import folder_paths

    info = {name: {"input": node.INPUT_TYPES()} for name, node in host.nodes.items()}
    api = to_api(read("Your photo, your checkpoint"), info)
    widgets = {node["class_type"]: node["inputs"] for node in api.values()}
    file = widgets["MoAFromIPAdapter"]["ipadapter_name"].removesuffix(".safetensors")
    ready = {
        "CheckpointLoaderSimple": loaded,
        "MoAFromIPAdapter": (adapter(host, toy_base.unet, tmp_path, "plus", file),),
    }
    widgets["EmptyLatentImage"].update(width=IMAGE_SIZE, height=IMAGE_SIZE)
    widgets["KSampler"]["steps"] = 4

    def paint(photo):
        pixels = (255 * picture(photo)[0]).byte().numpy()
        Image.fromarray(pixels).save(f"{folder_paths.get_input_directory()}/{widgets['LoadImage']['image']}")
        return host.run_graph(api, ready, "VAEDecode")[0]

    drawn = paint(0)
    assert drawn.shape == (1, IMAGE_SIZE, IMAGE_SIZE, 3) and (drawn - paint(1)).abs().max() > 1e-2
    widgets["MoASubjectEncoder"]["word"] = "nobody"  # whom the prompt does not name: the checkpoint alone
    alone = paint(0)
    assert torch.equal(alone, paint(1)) and (drawn - alone).abs().max() > 1e-2
