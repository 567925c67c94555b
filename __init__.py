"""ComfyUI-MoA: put people from reference photos into pictures with Mixture-of-Attention."""

import logging
import sys
from pathlib import Path

try:
    import folder_paths  # ComfyUI's own; absent when the repository is used for training
except ModuleNotFoundError:
    folder_paths = None


def _loaded_before() -> Path | None:
    """The folder of another copy of the pack whose nodes ComfyUI has already."""
    known = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {}).get("MoAPatchModel")
    file = getattr(sys.modules.get(getattr(known, "__module__", None)), "__file__", None)
    folder = None if file is None else Path(file).parent.parent
    return None if folder == Path(__file__).parent else folder


if folder_paths is not None:
    first = _loaded_before()
    if first is None:
        from .nodes import comfy_entrypoint

        WEB_DIRECTORY = "./web"  # the nodes' help pages, and what keeps their sockets in order
        __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
    else:
        logging.warning(
            "MoA: ComfyUI-MoA is installed twice. The nodes are those of %s; %s stays out. Delete one of the two "
            "folders and restart ComfyUI",
            first,
            Path(__file__).parent,
        )
        NODE_CLASS_MAPPINGS = {}
