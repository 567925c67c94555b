"""ComfyUI-MoA: put people from reference photos into pictures with Mixture-of-Attention."""

try:
    import folder_paths  # ComfyUI's own; absent when the repository is used for training
except ModuleNotFoundError:
    folder_paths = None

if folder_paths is not None:
    from .nodes import comfy_entrypoint

    WEB_DIRECTORY = "./web"  # the nodes' help pages; no JavaScript
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
