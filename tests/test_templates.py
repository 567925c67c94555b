"""The shared workflows name the packs that their nodes come from, so that a ComfyUI without them can say which."""

import re
from urllib.parse import quote, unquote

import pytest
import tomlkit

from training.comfyui import NAME, PACK
from training.comfyui.templates import ENDING, NAMES, NEEDS_FILES, NOTES, read

project = tomlkit.parse((PACK / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_host_tests_install_the_pack_under_the_registrys_name():
    assert project["project"]["name"] == NAME


@pytest.mark.parametrize("name", NAMES)
def test_every_node_of_a_template_names_its_pack_and_version(name):
    ours = (project["project"]["name"], project["project"]["version"])
    core = ("comfy-core", project["tool"]["comfy"]["requires-comfyui"].removeprefix(">="))
    nodes = [node for node in read(name)["nodes"] if node["type"] not in NOTES]
    named = {node["type"]: (node["properties"].get("cnr_id"), node["properties"].get("ver")) for node in nodes}
    assert named == {kind: ours if kind.startswith("MoA") else core for kind in named}


@pytest.mark.parametrize("name", NAMES)
def test_old_and_new_frontends_read_the_same_values_of_a_template(name):
    """Old ones read values by their places, new ones by their names."""
    for node in read(name)["nodes"]:
        if named := node.get("widgets_values_named"):
            assert list(named.values()) == node["widgets_values"], node["type"]


def test_the_readme_shows_every_template_and_its_links_lead_somewhere():
    text = (PACK / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r'^\| <img src="([^"]+)"[^|]+\| \*\*(.+?)\*\* \|', text, re.MULTILINE)
    assert sorted(rows) == sorted((quote(f"workflows/{name}{ENDING}.jpg", safe="/()"), name) for name in NAMES)
    headings = {re.sub(r"[^\w -]", "", line).replace(" ", "-").lower() for line in re.findall("^#+ (.+)", text, re.M)}
    for link in re.findall(r'\]\(([^)\s]+)|src="([^"]+)"', text):
        file, _, heading = unquote("".join(link)).partition("#")
        if not file.startswith("https:"):
            assert (PACK / file).exists() and (file or heading in headings), link


FOLDERS = {"CheckpointLoaderSimple": "checkpoints", "CLIPVisionLoader": "clip_vision", "MoAFromIPAdapter": "ipadapter"}
"""Where the loaders of published files look."""


@pytest.mark.parametrize("name", sorted(NEEDS_FILES))
def test_a_template_says_where_the_files_come_from_that_it_needs(name):
    loaders = [node for node in read(name)["nodes"] if node["type"] in FOLDERS]
    assert loaders
    for node in loaders:
        (model,) = node["properties"]["models"]
        assert (model["name"], model["directory"]) == (node["widgets_values"][0], FOLDERS[node["type"]])
        assert re.fullmatch(r"[^/]+\.safetensors", model["name"])  # the frontend offers no others, and no folders
        assert re.fullmatch(r"https://huggingface\.co/[^/]+/[^/]+/resolve/main/.+\.safetensors", model["url"])


@pytest.mark.parametrize("name", [name for name in NAMES if "linearData" in read(name)["extra"]])
def test_an_app_asks_for_widgets_that_are_there_and_shows_saved_pictures(name):
    nodes = {str(node["id"]): node for node in read(name)["nodes"]}
    app = read(name)["extra"]["linearData"]
    labels = []
    for node, widget in app["inputs"]:
        (slot,) = [slot for slot in nodes[node]["inputs"] if slot["name"] == widget and slot["widget"]]
        labels.append(slot.get("label", widget))
    assert "prompt" in labels
    assert [nodes[node]["type"] for node in app["outputs"]] == ["SaveImage"]
