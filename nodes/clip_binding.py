"""A CLIP that notes, as it encodes a prompt, which token positions carry which subject."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
from torch import Tensor

from ..moa_core.subjects.binding import BoundPrompt, bind
from ..moa_core.subjects.subject import Subject

BOUND_PROMPT = "moa_bound_prompt"
"""Key of the NotedPrompt in a conditioning's dictionary."""
CHUNK = 77
"""Tokens that the text encoder reads at once."""
CHUNKS_KNOWN = 1024
Chunk = tuple[list, ...]
"""The tokens of one chunk as each tower of the text encoder sees them: CLIP-L, and of SDXL CLIP-G as well."""


@dataclass(frozen=True, eq=False)
class NotedPrompt(BoundPrompt):
    """A bound prompt as a conditioning carries it: with its tokens, and with whom to ask for more."""

    chunks: tuple[Chunk, ...] = ()
    binder: Binder | None = None

    def grown_to(self, text: Tensor) -> BoundPrompt:
        """This prompt in an embedding [1, T, D] to which others were appended (ConditioningConcat).

        Appended prompts leave nothing in the conditioning but their embedding, by which they are known again; one
        that this CLIP did not encode binds nothing.
        """
        own = CHUNK * len(self.chunks)
        if text.shape[1] <= own or text.shape[1] % CHUNK:
            return self
        return self.binder.bind([*self.chunks, *self.binder.recall(text[:, own:])])


class Binder:
    """Binds the prompts of a CLIP and of its clones to subjects, and knows again what they have encoded."""

    def __init__(self, clip: comfy.sd.CLIP, subjects: Sequence[Subject]):
        """Raises ValueError for a word that holds nothing to bind to."""
        self.towers = [Tower(name, tokenizer) for name, tokenizer in text_towers(clip).items()]
        self.subjects = subjects
        self.words = [[tower.word_ids(clip, subject.word) for subject in subjects] for tower in self.towers]
        self._known: OrderedDict[bytes, Chunk] = OrderedDict()

    def chunks(self, tokens: dict[str, list]) -> list[Chunk]:
        """Of a tokenized prompt {"l": chunks of (token, weight)}: the tokens that the encoder will see.

        Of SDXL's towers ("l" and "g") the encoder leaves out what only one of them has.
        """
        return list(zip(*(tower.chunks(tokens) for tower in self.towers), strict=False))

    def bind(self, chunks: Sequence[Chunk]) -> NotedPrompt:
        """Both towers of SDXL number their tokens alike, unless they read different texts or embeddings: then a
        subject has the word's places in either.
        """
        texts, bindings = [], []
        for number, (tower, words) in enumerate(zip(self.towers, self.words, strict=True)):
            own = [chunk[number] for chunk in chunks]
            bound = bind(tower.text(own), own, words, self.subjects, tower.ends_word)
            texts.append(bound.prompt)
            bindings += bound.bindings
        return NotedPrompt(" / ".join(dict.fromkeys(texts)), tuple(dict.fromkeys(bindings)), tuple(chunks), self)

    def note(self, chunks: Sequence[Chunk], text: Tensor) -> None:
        """Remember that these chunks became this embedding [1, T, D]."""
        if text.shape[1] == CHUNK * len(chunks):
            for chunk, piece in zip(chunks, text.split(CHUNK, dim=1), strict=True):
                self._known[_fingerprint(piece)] = chunk
        while len(self._known) > CHUNKS_KNOWN:
            self._known.popitem(last=False)

    def recall(self, text: Tensor) -> list[Chunk]:
        """The chunks that became this embedding [1, T, D]; blank ones for what is not known."""
        blank = tuple([tower.tokenizer.pad_token] * CHUNK for tower in self.towers)
        return [self._known.get(_fingerprint(piece), blank) for piece in text.split(CHUNK, dim=1)]


@dataclass(frozen=True)
class Tower:
    """One of the text encoder's CLIP models, by the name its tokens have: "l" or "g"."""

    name: str
    tokenizer: comfy.sd1_clip.SDTokenizer

    def chunks(self, tokens: dict[str, list]) -> list[list]:
        """An embedding of another width is dropped by the encoder, and what follows it moves up."""
        width = self.tokenizer.embedding_size
        return [
            [t[0] for t in chunk if isinstance(t[0], int) or t[0].shape[-1] == width] for chunk in tokens[self.name]
        ]

    def word_ids(self, clip: comfy.sd.CLIP, word: str) -> list[int]:
        """Raises ValueError for a word that holds nothing to bind to."""
        chunk = clip.tokenize(word)[self.name][0]
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


class BindingCLIP(comfy.sd.CLIP):
    """Encodes exactly as the CLIP it was made from; its clones (LoRA, CLIP skip) bind as well."""

    binder: Binder

    def clone(self, *args, **kwargs):
        return _with_binder(super().clone(*args, **kwargs), self.binder)

    def encode_from_tokens(self, tokens, return_pooled=False, return_dict=False):
        out = super().encode_from_tokens(tokens, return_pooled=return_pooled, return_dict=return_dict)
        chunks = self.binder.chunks(tokens)
        self.binder.note(chunks, out["cond"] if return_dict else out[0] if return_pooled else out)
        return out | {BOUND_PROMPT: self.binder.bind(chunks)} if return_dict else out

    def encode_from_tokens_scheduled(self, tokens, unprojected=False, add_dict={}, show_pbar=True):  # noqa: B006
        chunks = self.binder.chunks(tokens)
        add_dict = {**add_dict, BOUND_PROMPT: self.binder.bind(chunks)}
        conditioning = super().encode_from_tokens_scheduled(tokens, unprojected, add_dict, show_pbar)
        for text, _ in conditioning:
            self.binder.note(chunks, text)
        return conditioning


def bind_subjects(clip: comfy.sd.CLIP, subjects: Sequence[Subject]) -> BindingCLIP:
    """Turn a fresh clone of a CLIP into one that binds these subjects.

    Raises ValueError for a word that holds nothing to bind to.
    """
    return _with_binder(clip, Binder(clip, subjects))


def text_towers(clip: comfy.sd.CLIP) -> dict[str, comfy.sd1_clip.SDTokenizer]:
    """The tokenizers of an SD 1.x or SDXL CLIP, by the names of their tokens; none for another kind of encoder."""
    tokenizer = clip.tokenizer
    if isinstance(clip.cond_stage_model, comfy.sdxl_clip.SDXLClipModel):
        return {"l": tokenizer.clip_l, "g": tokenizer.clip_g}
    return {"l": tokenizer.clip_l} if getattr(tokenizer, "clip", None) == "clip_l" else {}


def _with_binder(clip: comfy.sd.CLIP, binder: Binder) -> BindingCLIP:
    clip.__class__ = BindingCLIP
    clip.binder = binder
    return clip


def _fingerprint(piece: Tensor) -> bytes:
    """Of one chunk's embedding [1, CHUNK, D]."""
    return hashlib.sha256(piece.detach().float().cpu().contiguous().numpy().tobytes()).digest()
