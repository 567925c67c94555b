"""How well a picture suits its prompt: the cosine similarity of CLIP's image and text embeddings."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from training.host.pretrained import read_model


class ClipJudge:
    """A CLIP (the paper's is ViT-L/14) from a folder as transformers saves it."""

    def __init__(self, folder: Path, device: torch.device):
        """Raises ValueError or OSError for a folder that does not hold model and processor."""
        config = folder / "config.json"
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type") if config.is_file() else "none"
        if kind != "clip":  # of a vision model alone, transformers would make a CLIPModel with random weights
            raise ValueError(
                f"--clip: expected the folder of a transformers CLIPModel, its config.json of model_type clip; "
                f"found {kind} at {folder}"
            )
        self.processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        self.network = read_model(CLIPModel, folder).float()
        self.network.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def prompt_consistency(self, picture: Image.Image, prompt: str) -> float:
        """Cosine similarity of an RGB picture and a prompt, -1..1."""
        options = {"return_tensors": "pt", "padding": True, "truncation": True}
        inputs = self.processor(text=[prompt], images=[picture], **options).to(self.network.device)
        found = self.network(**inputs)  # both embeddings [1, E] are unit vectors
        return float((found.image_embeds * found.text_embeds).sum())
