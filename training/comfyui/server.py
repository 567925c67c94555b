"""A ComfyUI beside this pack: find it, run it headless, queue workflows over its HTTP API.

Imports nothing of ComfyUI: it runs in a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

PACK = Path(__file__).resolve().parents[2]
NAME = "mixture-of-attention"  # in the Comfy registry, and so the folder that ComfyUI-Manager installs it into
FLAGS = os.environ.get("COMFYUI_FLAGS", "--cpu").split()
"""Of ComfyUI's command line; "" is a GPU as ComfyUI uses it by default."""


def find_comfyui() -> Path | None:
    """COMFYUI_PATH; else the ComfyUI that holds this pack in custom_nodes; else comfy-cli's default place."""
    if named := os.environ.get("COMFYUI_PATH"):
        if not _is_comfyui(Path(named)):
            raise SystemExit(f"COMFYUI_PATH is '{named}', which holds no main.py and no comfy folder")
        return Path(named).resolve()
    places = [PACK.parent.parent] if PACK.parent.name == "custom_nodes" else []
    return next((p for p in [*places, Path.home() / "comfy" / "ComfyUI"] if _is_comfyui(p)), None)


def _is_comfyui(path: Path) -> bool:
    return (path / "main.py").is_file() and (path / "comfy").is_dir()


def version(comfyui: Path) -> str:
    found = re.search(r'__version__ = "([^"]+)"', (comfyui / "comfyui_version.py").read_text(encoding="utf-8"))
    return found[1] if found else "of unknown version"


def make_base_directory(folder: Path) -> Path:
    """A ComfyUI base directory with this pack in custom_nodes, and room for models and pictures."""
    models = ("checkpoints", "moa", "loras", "controlnet", "embeddings")
    for name in ("custom_nodes", "input", "output", *(f"models/{kind}" for kind in models)):
        (folder / name).mkdir(parents=True, exist_ok=True)
    link = folder / "custom_nodes" / NAME
    if not link.is_symlink():
        link.symlink_to(PACK)
    return folder


class Server:
    """A ComfyUI with FLAGS on a free local port, for as long as the `with` block lasts."""

    def __init__(self, comfyui: Path, base: Path):
        self.comfyui, self.base = comfyui, base
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = base / "comfyui.log"

    def __enter__(self) -> Server:
        command = [sys.executable, "main.py", *FLAGS, "--disable-auto-launch", "--base-directory", str(self.base)]
        command += ["--database-url", "sqlite:///:memory:"]  # the usual file lets one server in
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port)], cwd=self.comfyui, stdout=log, stderr=subprocess.STDOUT
            )
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.get("/system_stats")
                return self
            except OSError:
                time.sleep(0.5)
        self.__exit__()
        end = self.log.read_text(encoding="utf-8")[-3000:]
        raise RuntimeError(f"ComfyUI did not start; the end of its log:\n{end}")

    def __exit__(self, *_: Any) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def get(self, path: str) -> Any:
        """JSON, or bytes where the answer is a picture."""
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            content = answer.read()
            return json.loads(content) if answer.headers.get_content_type() == "application/json" else content

    def queue(self, workflow: dict[str, Any], timeout: float = 600.0) -> dict[str, Any]:
        """Run an API workflow to its end: its entry in ComfyUI's history.

        Raises RuntimeError with ComfyUI's own words when it is refused or stops in an error.
        """
        body = json.dumps({"prompt": workflow}).encode()
        request = urllib.request.Request(self.url + "/prompt", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                prompt_id = json.load(answer)["prompt_id"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"ComfyUI refused the workflow: {error.read().decode()}") from error
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry and entry["status"]["completed"]:
                return entry
            if entry and entry["status"]["status_str"] == "error":
                messages = [data for kind, data in entry["status"]["messages"] if kind == "execution_error"]
                raise RuntimeError(f"{messages[0]['node_type']}: {messages[0]['exception_message']}")
            time.sleep(0.2)
        raise RuntimeError(f"the workflow took longer than {timeout:.0f} s")

    def pictures(self, entry: dict[str, Any], node: str) -> list[bytes]:
        """The PNG files that an output node of a finished workflow made."""
        images = entry["outputs"][node]["images"]
        return [self.get("/view?" + urllib.parse.urlencode(image)) for image in images]
