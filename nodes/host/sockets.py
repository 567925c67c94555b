"""What schemas of the pack share: socket types, where its nodes are found, and the word that a subject binds to."""

from comfy_api.latest import io

MOA = io.Custom("MOA")
MOA_SUBJECT = io.Custom("MOA_SUBJECT")
INSIGHTFACE = io.Custom("INSIGHTFACE")
"""Another pack's: its loaders fill it."""
CATEGORY = "MoA"
KEEP_PREVIEW = {"has_intermediate_output": True} if hasattr(io.Schema, "has_intermediate_output") else {}
"""Shows a node's preview again where its results come from the cache; ComfyUI 0.12 has no such flag."""
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
    "face id lora",
    "ip-adapter",
    "instantid",
]
"""What someone types who looks for a pack like this one."""
NO_WORD = "'word' is empty. Enter the word of your prompt that names the person: man"


def names_someone(word: str | None) -> bool | str:
    """Whether a word in a widget can be bound; what to do where it cannot."""
    return NO_WORD if word is not None and not word.strip() else True  # None: it comes from another node


def own_word(word: str, node: str) -> str:
    """The word as it is bound. Raises ValueError for an empty one."""
    if not word.strip():
        raise ValueError(f"{node}: {NO_WORD}")
    return word.strip()
