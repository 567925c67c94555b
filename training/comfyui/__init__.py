"""A ComfyUI beside this pack: found, run headless, given workflows."""

from training.comfyui.server import NAME, PACK, Server, find_comfyui, make_base_directory, version

__all__ = ["NAME", "PACK", "Server", "find_comfyui", "make_base_directory", "version"]
