"""The two socket types of the pack, and where its nodes are found."""

from comfy_api.latest import io

MOA = io.Custom("MOA")
MOA_SUBJECT = io.Custom("MOA_SUBJECT")
CATEGORY = "MoA"
SEARCHED = [
    "mixture of attention",
    "personalization",
    "face",
    "person",
    "people",
    "portrait",
    "identity",
    "character",
    "consistent character",
    "face swap",
    "swap",
    "photomaker",
    "pulid",
    "faceid",
    "ip-adapter",
    "instantid",
]
"""What someone types who looks for a pack like this one."""
