"""A ComfyUI beside this pack: found, run headless, given workflows."""

from training.comfyui.server import FLAGS, NAME, PACK, Server, find_comfyui, make_base_directory, version

__all__ = ["FLAGS", "NAME", "PACK", "Server", "find_comfyui", "make_base_directory", "version"]
