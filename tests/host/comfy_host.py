"""A real ComfyUI in this process, with the pack loaded the way it loads custom nodes."""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from training.comfyui import FLAGS, NAME, find_comfyui

WORD_SIZE = 64


class Host:
    """What a user's graph does, node by node."""

    def __init__(self, base: Path, node_classes: dict):
        self.base, self.nodes = base, node_classes

    def run(self, node_id: str, *args, **kwargs):
        """Execute one node, old or new style; a tuple of its outputs."""
        node = self.nodes[node_id]
        if hasattr(node, "define_schema"):
            out = node.execute(*args, **kwargs)
            return out.result if hasattr(out, "result") else out
        return getattr(node(), node.FUNCTION)(*args, **kwargs)

    def run_graph(self, api: dict, ready: dict[str, tuple], wanted: str) -> tuple:
        """The outputs of the node of a type in an API workflow; ready: outputs of the types that are not executed."""

        @cache
        def outputs(number: str) -> tuple:
            kind, inputs = api[number]["class_type"], {}
            if kind in ready:
                return ready[kind]
            for name, value in api[number]["inputs"].items():
                value = outputs(value[0])[value[1]] if isinstance(value, list) else value
                group, dot, member = name.partition(".")
                if dot:
                    inputs.setdefault(group, {})[member] = value
                else:
                    inputs[name] = value
            return self.run(kind, **inputs)

        return outputs(next(number for number, node in api.items() if node["class_type"] == wanted))

    def module(self, name: str):
        """A module of the pack, as the host imported it: `nodes.patch_model`, `moa_core.subjects.binding`."""
        pack = next(m for m in sys.modules if m.endswith(".nodes.patch_model")).removesuffix(".nodes.patch_model")
        return importlib.import_module(f"{pack}.{name}")

    def prompt(self, clip, text: str):
        return self.run("CLIPTextEncode", clip, text)[0]

    def sample(self, model, positive, negative, seed=1, steps=3, cfg=4.0, sampler="euler", size=16, batch=1, **others):
        """KSampler's LATENT dictionary."""
        latent = others.pop("latent", {"samples": torch.zeros(batch, 4, size, size)})
        return self.run("KSampler", model, seed, steps, cfg, sampler, "normal", positive, negative, latent, **others)[0]

    def subject(self, moa, seed: int = 0, word: str = "man", **widgets):
        """Of a picture; without a MOA of the LoRA `random-<seed>`."""
        if moa is None:
            return self.run("MoALoRASubject", f"random-{seed}.safetensors", word, **widgets)[0]
        picture = torch.rand(1, WORD_SIZE, WORD_SIZE, 3, generator=torch.Generator().manual_seed(seed))
        return self.run("MoASubjectEncoder", moa, picture, word, **widgets)[0]

    def patch(self, model, clip, moa, *subjects, **widgets):
        chosen = {f"subject{i}": subject for i, subject in enumerate(subjects)}
        return self.run("MoAPatchModel", model, clip, moa, chosen, **widgets)


def start_host(base: Path, flags: Sequence[str] = FLAGS) -> Host:
    """Import ComfyUI and the pack; once in a process. flags: of ComfyUI's own command line."""
    sys.path.insert(0, str(find_comfyui()))
    import comfy.options

    comfy.options.enable_args_parsing()
    own, sys.argv = sys.argv, ["main.py", *flags, "--base-directory", str(base)]
    import comfy.cli_args  # reads the command line

    sys.argv = own
    before = os.getcwd()
    import nodes

    with torch.inference_mode():
        asyncio.run(nodes.init_extra_nodes(init_custom_nodes=False, init_api_nodes=False))
        assert asyncio.run(nodes.load_custom_node(str(base / "custom_nodes" / NAME), module_parent="custom_nodes"))
    os.chdir(before)
    return Host(base, nodes.NODE_CLASS_MAPPINGS)
