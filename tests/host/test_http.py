"""A shared API workflow in a real ComfyUI server, over HTTP, as a user runs it."""

import copy
import io
import re

import numpy as np
import pytest
import torch
from conftest import unsaturated
from PIL import Image

from toy_world.shape import IMAGE_SIZE
from training.comfyui import NAME, PACK, Server, find_comfyui, make_base_directory

LANGUAGES = sorted(path.name for path in (PACK / "locales").iterdir())
LITERALS = re.compile(
    r"(?<= ')[^']+(?=')"  # an example
    r"|[\w*.-]*[/_*\d][\w*./-]*\w|\d|\.safetensors"  # a path, a file, an input, a number
    r"|\b[A-Z]{2,}\b|\b(?:wo)?man\b|\b(?:sparse|dense|linear|slerp)\b"  # a socket, a word of the prompt, a choice
)
"""What a tooltip keeps in every language."""


def person(path, seed):
    """A cut-out reference picture."""
    pixels = np.random.default_rng(seed).integers(0, 255, (96, 80, 4), dtype=np.uint8)
    pixels[..., 3] = 0
    pixels[10:90, 20:60, 3] = 255
    Image.fromarray(pixels).save(path)
    return path.name


@pytest.fixture(scope="module")
def server(tmp_path_factory, toy_base, stirred_moa):
    from moa_core.learned.moa_file import save_moa
    from training.host.toy_base import save_toy

    base = make_base_directory(tmp_path_factory.mktemp("server"))
    with torch.inference_mode(False):
        save_toy(unsaturated(copy.deepcopy(toy_base)), base / "models/checkpoints/toy.safetensors")
        save_moa(stirred_moa, base / "models/moa/moa-toy.safetensors")
    for number, name in enumerate(("ann", "bob", "cid")):
        person(base / f"input/{name}.png", number)
    with Server(find_comfyui(), base) as running:
        yield running


def graph(checkpoint: str, moa: str, people: list[tuple[str, str]], prompt: str, seed: int = 7) -> dict:
    """The API workflow: people are (file in the input folder, cut out by its alpha; word)."""
    nodes = {
        "base": node("CheckpointLoaderSimple", ckpt_name=checkpoint),
        "moa": node("MoALoader", moa_name=moa),
        "patch": node(
            "MoAPatchModel",
            model=["base", 0],
            clip=["base", 1],
            moa=["moa", 0],
            strength=1.0,
            start_percent=0.0,
            end_percent=1.0,
            routing="sparse",
        ),
        "positive": node("CLIPTextEncode", clip=["patch", 1], text=prompt),
        "negative": node("CLIPTextEncode", clip=["patch", 1], text=""),
        "latent": node("EmptyLatentImage", width=IMAGE_SIZE, height=IMAGE_SIZE, batch_size=1),
        "sample": node(
            "KSampler",
            model=["patch", 0],
            positive=["positive", 0],
            negative=["negative", 0],
            latent_image=["latent", 0],
            seed=seed,
            steps=12,
            cfg=4.0,
            sampler_name="uni_pc",
            scheduler="normal",
            denoise=1.0,
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["base", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="moa"),
        "visualize": node("MoARouterVisualizer", model=["patch", 0], samples=["sample", 0], image=["decode", 0]),
        "maps": node("PreviewImage", images=["visualize", 0]),
    }
    for number, (file, word) in enumerate(people):
        nodes[f"image{number}"] = node("LoadImage", image=file)
        nodes[f"mask{number}"] = node("InvertMask", mask=[f"image{number}", 1])  # LoadImage's mask is the background
        nodes[f"subject{number}"] = node(
            "MoASubjectEncoder", moa=["moa", 0], image=[f"image{number}", 0], word=word, mask=[f"mask{number}", 0]
        )
        nodes["patch"]["inputs"][f"subjects.subject{number}"] = [f"subject{number}", 0]
    return nodes


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def workflow(*names, words=("man", "woman"), **others):
    people = [(f"{name}.png", word) for name, word in zip(names, words, strict=True)]
    return graph("toy.safetensors", "moa-toy.safetensors", people, prompt="a man and a woman", **others)


def cached(entry) -> set[str]:
    return {node for kind, data in entry["status"]["messages"] if kind == "execution_cached" for node in data["nodes"]}


def seen_inputs(node: dict) -> dict:
    """All but what the host hands to a node unseen."""
    return node["input"].get("required", {}) | node["input"].get("optional", {})


def test_image_and_maps_come_out_and_another_subject_encodes_only_itself_anew(server):
    first = server.queue(workflow("ann", "bob"))
    picture = Image.open(io.BytesIO(server.pictures(first, "save")[0]))
    maps = Image.open(io.BytesIO(server.pictures(first, "maps")[0]))
    assert picture.size == (IMAGE_SIZE, IMAGE_SIZE) and min(maps.size) > 300
    assert np.asarray(maps).std() > 10
    second = server.queue(workflow("ann", "cid"))
    kept = cached(second)
    assert {"base", "moa", "image0", "mask0", "subject0", "latent"} <= kept
    assert not {"image1", "subject1", "patch", "positive", "sample", "save"} & kept
    other = Image.open(io.BytesIO(server.pictures(second, "save")[0]))
    change = np.abs(np.asarray(other, int) - np.asarray(picture, int))
    print(f"of 255, another subject changes up to {change.max()}")
    assert change.max() > 3


def test_the_nodes_describe_themselves(server):
    info = server.get("/object_info")
    ours = [name for name, node in info.items() if node["python_module"].endswith(NAME)]
    assert len(ours) == 13
    for name in ours:
        node = info[name]
        assert node["description"] and node["display_name"] and node["search_aliases"]
        for key, (_, *options) in seen_inputs(node).items():
            assert options and options[0].get("tooltip"), f"{name}.{key} has no tooltip"
    assert info["MoALoader"]["input"]["required"]["moa_name"][1]["options"] == ["moa-toy.safetensors"]
    assert info["MoAPatchModel"]["output"] == ["MODEL", "CLIP"]


def test_errors_reach_the_user_as_sentences(server):
    with pytest.raises(RuntimeError, match='refused .*word - \'word\' is empty.*"input_name": "word"'):
        server.queue(workflow("ann", "bob", words=("man", "")))
    server.queue(workflow("ann", "bob", words=("man", "dragon"), seed=11))
    log = server.log.read_text()
    assert (
        log.count("subject1 will not appear: no 'dragon' in the prompt. The prompt 'a man and a woman' does not hold")
        == 1
    )
    assert "Traceback" not in log.split("Starting server")[-1].split("'word' is empty")[-1]


@pytest.fixture(scope="module")
def ours(server):
    """What ComfyUI says of the pack's nodes."""
    return {name: n for name, n in server.get("/object_info").items() if n["python_module"].endswith(NAME)}


@pytest.mark.parametrize("language", LANGUAGES)
def test_names_and_tooltips_are_served_in_every_language_for_every_node_input_and_output(server, ours, language):
    translated = server.get("/i18n")[language]["nodeDefs"]
    assert sorted(translated) == sorted(ours)
    for name, node in ours.items():
        own = translated[name]
        tooltips = {key: options[0]["tooltip"] for key, (_, *options) in seen_inputs(node).items()}
        assert sorted(own["inputs"]) == sorted(tooltips), name
        assert sorted(own["outputs"]) == [str(i) for i in range(len(node["output"]))], name
        assert all(node["output_tooltips"]), name
        pairs = [(node["display_name"], own["display_name"]), (node["description"], own["description"])]
        pairs += [(text, own["inputs"][key]["tooltip"]) for key, text in tooltips.items()]
        pairs += [(text, own["outputs"][str(i)]["tooltip"]) for i, text in enumerate(node["output_tooltips"])]
        for english, there in pairs:
            assert there.strip() and there != english, f"{name}: {english}"
            lost = {literal for literal in LITERALS.findall(english) if literal not in there}
            assert not lost, f"{name}: {there}"
