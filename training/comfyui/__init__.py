"""A ComfyUI beside this pack: found, run headless, given workflows."""

from training.comfyui.server import PACK, Server, find_comfyui, make_base_directory, version

__all__ = ["PACK", "Server", "find_comfyui", "make_base_directory", "version"]
