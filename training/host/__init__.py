"""MoA in diffusers, as nodes/ is MoA in ComfyUI: base models, the U-Net with its MoA, sampling."""
