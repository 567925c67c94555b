"""The standard CLIP tokenizer, built from the vocabulary that open_clip ships, without a download."""

from __future__ import annotations

import json
import tempfile
from functools import lru_cache
from pathlib import Path

from open_clip.tokenizer import SimpleTokenizer
from transformers import CLIPTokenizerFast

from moa_core.subjects.binding import BoundPrompt, bind
from moa_core.subjects.subject import Subject

LENGTH = 77


@lru_cache
def clip_tokenizer() -> CLIPTokenizerFast:
    """transformers' CLIPTokenizer with SD's padding (by the end token)."""
    source = SimpleTokenizer()
    vocabulary = {source.decoder[i]: i for i in range(len(source.decoder))}
    start, end = source.decoder[source.sot_token_id], source.decoder[source.eot_token_id]
    for old, new in ((start, "<|startoftext|>"), (end, "<|endoftext|>")):
        vocabulary[new] = vocabulary.pop(old)
    with tempfile.TemporaryDirectory() as folder:  # the one form that every version of transformers reads
        (Path(folder) / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        merges = ["#version: 0.2", *(" ".join(pair) for pair in source.bpe_ranks)]
        (Path(folder) / "merges.txt").write_text("\n".join(merges), encoding="utf-8")
        special = dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>")
        return CLIPTokenizerFast.from_pretrained(
            folder, bos_token="<|startoftext|>", **special, model_max_length=LENGTH, local_files_only=True
        )


def tokenize(prompt: str) -> list[int]:
    """LENGTH token ids: start, text, end, padding."""
    return clip_tokenizer()(prompt, padding="max_length", truncation=True, max_length=LENGTH)["input_ids"]


def token_before(prompt: str, end: int) -> int:
    """The position of the token that ends at this character of the prompt, -1 when it is cut off or not there."""
    offsets = clip_tokenizer()(prompt, truncation=True, max_length=LENGTH, return_offsets_mapping=True)[
        "offset_mapping"
    ]
    return next((position for position, (start, stop) in enumerate(offsets) if stop == end > start), -1)


def bind_prompt(prompt: str, subjects: list[Subject]) -> BoundPrompt:
    """Bindings of subjects to the words of a prompt, by the rule of the ComfyUI nodes."""
    tokenizer = clip_tokenizer()
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    words = [[t for t in tokenizer(s.word)["input_ids"] if t not in special] for s in subjects]
    return bind(
        prompt,
        [tokenize(prompt)],
        words,
        subjects,
        lambda token: token in special or tokenizer.convert_ids_to_tokens(token).endswith("</w>"),
    )
