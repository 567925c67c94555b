"""The CLIP models that a text encoder is made of, and the tokens that they read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip

CHUNK = 77
"""Tokens that the text encoder reads at once."""
ROOM = CHUNK - 2
"""Of them text, between a start and an end."""


@dataclass(frozen=True)
class Tower:
    """One of the text encoder's CLIP models, by the name its tokens have: "l" or "g"."""

    name: str
    tokenizer: comfy.sd1_clip.SDTokenizer

    def chunks(self, tokens: dict[str, list]) -> list[list]:
        """The tokens of each chunk as the encoder reads them."""
        return [[chunk[index][0] for index in self.seen(chunk)] for chunk in tokens[self.name]]

    def seen(self, chunk: Sequence[tuple]) -> list[int]:
        """Which of a chunk's tokens the encoder reads: an embedding of another width is dropped, the rest moves up."""
        width = self.tokenizer.embedding_size
        return [n for n, (token, *_) in enumerate(chunk) if isinstance(token, int) or token.shape[-1] == width]

    def body(self, chunk: Sequence[tuple]) -> list[tuple]:
        """A chunk's tokens of text: after its start, and before its end if that is there."""
        tokens = list(chunk[1:])
        ends = [
            n for n, (token, *_) in enumerate(tokens) if isinstance(token, int) and token == self.tokenizer.end_token
        ]
        return tokens[: ends[0]] if ends else tokens

    def chunk(self, body: Sequence[tuple]) -> list[tuple]:
        """A whole chunk of these tokens of text."""
        ends = [(self.tokenizer.start_token, 1.0), *body, (self.tokenizer.end_token, 1.0)]
        return ends + [(self.tokenizer.pad_token, 1.0)] * (CHUNK - len(ends))

    def word_ids(self, clip: comfy.sd.CLIP, word: str) -> list[int]:
        """Raises ValueError for a word that holds nothing to bind to."""
        chunk = comfy.sd.CLIP.tokenize(clip, word)[self.name][0]
        ids = [token for token, *_ in chunk if isinstance(token, int) and self._is_text(token)]
        if not ids:
            raise ValueError(
                f"MoA Patch Model: the word '{word}' of a subject has no token of text. Enter an ordinary word in "
                "Subject Encoder: man"
            )
        return ids

    def ends_word(self, token: int) -> bool:
        return not self._is_text(token) or self.tokenizer.inv_vocab[token].endswith("</w>")

    def _is_text(self, token: int) -> bool:
        return token not in (self.tokenizer.start_token, self.tokenizer.end_token, self.tokenizer.pad_token)

    def text(self, chunks: Sequence[list]) -> str:
        """The prompt as this tower sees it, for messages."""
        pieces = [
            self.tokenizer.inv_vocab[token] if isinstance(token, int) else "<embedding></w>"
            for chunk in chunks
            for token in chunk
            if not isinstance(token, int) or self._is_text(token)
        ]
        return "".join(pieces).replace("</w>", " ").strip()


def text_towers(clip: comfy.sd.CLIP) -> list[Tower]:
    """Of an SD 1.x or SDXL CLIP; none of another kind of encoder."""
    tokenizer = clip.tokenizer
    if isinstance(clip.cond_stage_model, comfy.sdxl_clip.SDXLClipModel):
        return [Tower("l", tokenizer.clip_l), Tower("g", tokenizer.clip_g)]
    return [Tower("l", tokenizer.clip_l)] if getattr(tokenizer, "clip", None) == "clip_l" else []
