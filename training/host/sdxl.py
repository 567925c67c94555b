"""SDXL in diffusers: how its two text encoders read a prompt, and what its U-Net is told besides."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection
from transformers.modeling_outputs import BaseModelOutputWithPooling

from training.host.tokenizer import clip_tokenizer


class TwoTexts(nn.Module):
    """CLIP-L and CLIP-G side by side, each by what its last layer but one makes."""

    def __init__(self, small: CLIPTextModel, large: CLIPTextModelWithProjection):
        super().__init__()
        self.small, self.large = small, large

    def forward(self, tokens: Tensor) -> BaseModelOutputWithPooling:
        """Ids [B, T], padded by the end token -> texts [B, T, 768 + 1280], and as pooler_output CLIP-G's [B, 1280]."""
        behind_end = (tokens == clip_tokenizer().eos_token_id).cumsum(dim=1) > 1
        small = self.small(tokens, output_hidden_states=True)
        large = self.large(tokens.masked_fill(behind_end, 0), output_hidden_states=True)  # it is padded by 0
        text = torch.cat([each.hidden_states[-2] for each in (small, large)], dim=-1)
        return BaseModelOutputWithPooling(text, large.text_embeds)


def added_conditions(pooled: Tensor, side: int) -> dict[str, Tensor]:
    """What the U-Net is told besides texts: what CLIP-G makes of them as a whole [B, 1280], and the picture's sizes."""
    sizes = pooled.new_tensor([side, side, 0, 0, side, side])  # of the original, of its crop, wanted: height, width
    return {"text_embeds": pooled, "time_ids": sizes.expand(len(pooled), -1)}
