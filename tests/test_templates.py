"""The shared workflows name the packs that their nodes come from, so that a ComfyUI without them can say which."""

import pytest
import tomlkit

from training.comfyui import NAME, PACK
from training.comfyui.templates import NAMES, NOTES, read

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
