"""The trained toy models that come with the pack."""

from training.comfyui import PACK

SHIPPED = ("checkpoints/moa-toy-base.safetensors", "moa/moa-toy.safetensors")


def shipped() -> bool:
    return all((PACK / "models" / path).is_file() for path in SHIPPED)
