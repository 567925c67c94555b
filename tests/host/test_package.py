"""What users download: the package as comfy-cli makes it for the registry, in a ComfyUI that has nothing else."""

import io
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from toy_world.shape import IMAGE_SIZE
from training.comfyui import NAME, PACK, Server, find_comfyui, make_base_directory
from training.comfyui.templates import ENDING, NAMES, to_api


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The zip that `comfy node pack` makes of the files here that git tracks, or would with the next commit."""
    checkout = tmp_path_factory.mktemp("checkout")
    git = ["git", f"--git-dir={checkout / '.git'}"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, f"--work-tree={PACK}", "add", "--all", "."], cwd=PACK, check=True)
    subprocess.run([*git, f"--work-tree={checkout}", "checkout-index", "--all"], cwd=checkout, check=True)
    command = [sys.executable, "-m", "comfy_cli", "--skip-prompt", "--no-enable-telemetry", "node", "pack"]
    subprocess.run(command, cwd=checkout, check=True)
    with zipfile.ZipFile(checkout / "node.zip") as made:
        yield made


def test_a_user_downloads_what_the_nodes_need_and_the_readme_shows_and_nothing_else(package):
    files = package.namelist()
    needed = {"__init__.py", "nodes", "moa_core", "toy_world", "models", "workflows", "subgraphs", "web", "locales"}
    about = {"LICENSE", "README.md", "pyproject.toml", "requirements.txt", "docs"}
    assert {name.split("/")[0] for name in files} == needed | about
    shown = re.findall(r"!\[.*?\]\((.+?)\)", package.read("README.md").decode())
    assert sorted(name for name in files if name.startswith("docs/")) == sorted(shown)
    assert {f"workflows/{name}{ENDING}{kind}" for name in NAMES for kind in (".json", ".jpg")} <= set(files)


def test_the_template_of_one_person_runs_from_the_package_alone(package, tmp_path):
    base = make_base_directory(tmp_path)
    folder = base / "custom_nodes" / NAME
    folder.unlink()  # the link to this checkout
    package.extractall(folder)
    with Server(find_comfyui(), base) as server:
        workflow = server.get(f"/api/workflow_templates/{NAME}/One%20person%20(MoA).json")
        entry = server.queue(to_api(workflow, server.get("/object_info")))
        saved = next(str(node["id"]) for node in workflow["nodes"] if node["type"] == "SaveImage")
        picture = Image.open(io.BytesIO(server.pictures(entry, saved)[0]))
    assert picture.size == (IMAGE_SIZE, IMAGE_SIZE) and np.asarray(picture).std() > 0.05 * 255
