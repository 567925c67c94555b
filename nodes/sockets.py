"""The two socket types of the pack."""

from comfy_api.latest import io

MOA = io.Custom("MOA")
MOA_SUBJECT = io.Custom("MOA_SUBJECT")
CATEGORY = "MoA"
