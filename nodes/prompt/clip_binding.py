"""A CLIP that notes, as it encodes a prompt, which token positions carry which subject."""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import comfy.sd
import torch
from torch import Tensor

from ...moa_core.subjects.binding import BoundPrompt, OwnText, bind
from ...moa_core.subjects.subject import Subject
from ..experts.lora_file import LoRAs
from .own_text import Places, own_texts
from .text_towers import CHUNK, text_towers

BOUND_PROMPT = "moa_bound_prompt"
"""Key of the NotedPrompt in a conditioning's dictionary."""
CHUNKS_KNOWN = 1024
PROMPTS_KNOWN = 64
Chunk = tuple[list, ...]
"""The tokens of one chunk as each tower of the text encoder sees them: CLIP-L, and of SDXL CLIP-G as well."""


@dataclass(frozen=True, eq=False)
class NotedPrompt(BoundPrompt):
    """A bound prompt as a conditioning carries it: with its tokens, and with whom to ask for more."""

    chunks: tuple[Chunk, ...] = ()
    binder: Binder | None = None
    text: Tensor | None = None
    """[1, T, D]: what it was encoded as; None: not known."""

    def as_in(self, text: Tensor) -> BoundPrompt:
        """This prompt in an embedding [1, T, D] that others may have changed: appended to it (ConditioningConcat) or
        blended with another (ConditioningAverage).

        Appended prompts leave nothing in the conditioning but their embedding, by which they are known again; one
        that this CLIP did not encode binds nothing. The subjects' own texts are changed likewise.
        """
        own = CHUNK * len(self.chunks)
        if text.shape[1] <= own or text.shape[1] % CHUNK:
            return self._blended(text)
        appended = [known.seen if known else self.binder.blank for known in self.binder.recall(text[:, own:])]
        grown = self.binder.bind([*self.chunks, *appended])
        blended = self._blended(text[:, :own])
        texts = [
            replace(o, texts=tuple(t if t is None else _appended(t, text[:, own:]) for t in o.texts))
            for o in blended.own_texts
        ]
        return replace(grown, own_texts=tuple(texts))

    def _blended(self, text: Tensor) -> NotedPrompt:
        if not self.own_texts or self.text is None or self.text.shape != text.shape or torch.equal(self.text, text):
            return self
        moved = (text - self.text)[0]  # [T, D]
        return replace(
            self,
            own_texts=tuple(
                replace(o, texts=tuple(t if t is None or t.shape[1] != len(moved) else t + moved for t in o.texts))
                for o in self.own_texts
            ),
        )


@dataclass(frozen=True, eq=False)
class Encoded:
    """One chunk that the CLIP has encoded."""

    seen: Chunk
    tokens: dict[str, list]
    """(token, weight), by the name of the tower."""
    clip: BindingCLIP | None
    """Who encoded it, where a subject may want the prompt in other words; None: nobody does."""
    bare: bool
    """Whether it was ever handed out as an embedding alone, without what the CLIP noted."""


class Binder:
    """Binds the prompts of a CLIP and of its clones to subjects, and knows again what they have encoded."""

    def __init__(self, clip: comfy.sd.CLIP, subjects: Sequence[Subject]):
        """Raises ValueError for a word that holds nothing to bind to."""
        self.towers = text_towers(clip)
        self.subjects = subjects
        self.words = [[tower.word_ids(clip, subject.word) for subject in subjects] for tower in self.towers]
        self.blank: Chunk = tuple([tower.tokenizer.pad_token] * CHUNK for tower in self.towers)
        self._known: OrderedDict[bytes, Encoded] = OrderedDict()
        self._noted: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        self._recognised: OrderedDict[bytes, NotedPrompt] = OrderedDict()
        self._read: OrderedDict[str, None] = OrderedDict()

    def __deepcopy__(self, memo: dict) -> Binder:
        return self  # a conditioning's copy asks whom the conditioning asks

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
        names = " / ".join(dict.fromkeys(texts))
        return NotedPrompt(names, tuple(dict.fromkeys(bindings)), chunks=tuple(chunks), binder=self)

    def places(self, tokens: dict[str, list]) -> dict[Subject, Places]:
        """Where each subject's word is bound in a tokenized prompt, [from, to) by the name of the tower."""
        found: dict[Subject, Places] = {}
        for tower, words in zip(self.towers, self.words, strict=True):
            lengths = dict(zip(self.subjects, map(len, words), strict=True))
            for bound in bind("", tower.chunks(tokens), words, self.subjects, tower.ends_word).bindings:
                end = bound.position + 1
                found.setdefault(bound.subject, {})[tower.name] = (end - lengths[bound.subject], end)
        return found

    def note(self, clip: BindingCLIP, tokens: dict[str, list], text: Tensor, bare: bool) -> None:
        """Remember that these tokens became this embedding [1, T, D]; bare: and that it is all that is handed out."""
        chunks = self.chunks(tokens)
        self._noted[id(text)] = text
        if text.shape[1] == CHUNK * len(chunks):
            asker = clip if any(isinstance(subject.adapter, LoRAs) for subject in self.subjects) else None
            for number, piece in enumerate(text.split(CHUNK, dim=1)):
                own = {tower.name: tokens[tower.name][number] for tower in self.towers}
                fingerprint = _fingerprint(piece)
                was_bare = fingerprint in self._known and self._known[fingerprint].bare
                self._known[fingerprint] = Encoded(chunks[number], own, asker, bare or was_bare)
        _forget_the_oldest(self._known, CHUNKS_KNOWN)

    def recall(self, text: Tensor) -> list[Encoded | None]:
        """The chunks that became this embedding [1, T, D]; None for each that is not known."""
        return [self._known.get(_fingerprint(piece)) for piece in text.split(CHUNK, dim=1)]

    def recognised(self, text: Tensor) -> NotedPrompt | None:
        """The prompt that became this embedding [1, T, D], where another node has built the conditioning of it.

        None: it is no embedding that this CLIP has made, or somebody has changed it. Another CLIP of the same weights
        may have made one of the same numbers: those count only where this CLIP has handed them out bare.
        """
        known = self.recall(text)
        if not any(each and (each.bare or self._noted.get(id(text)) is text) for each in known):
            return None
        fingerprint = _fingerprint(text)
        if fingerprint not in self._recognised:
            noted = replace(self.bind([each.seen if each else self.blank for each in known]), text=text)
            clip = known[0].clip if all(known) else None
            if clip is not None:
                tokens = {tower.name: [each.tokens[tower.name] for each in known] for tower in self.towers}
                own = own_texts(clip, self.towers, tokens, self.places(tokens))
                noted = replace(noted, own_texts=own[0] if own else ())
            self._recognised[fingerprint] = noted
            _forget_the_oldest(self._recognised, PROMPTS_KNOWN)
        return self._recognised[fingerprint]

    def note_read(self, tokens: dict[str, list]) -> None:
        """Remember that somebody has had this prompt tokenized, if it carries a subject."""
        bound = self.bind(self.chunks(tokens))
        if bound.bindings:
            self._read[bound.prompt] = None
        _forget_the_oldest(self._read, PROMPTS_KNOWN)

    def has_read_more_than(self, prompts: Sequence[BoundPrompt]) -> bool:
        """Whether somebody has had another prompt with a subject tokenized than these."""
        return bool(self._read.keys() - {prompt.prompt for prompt in prompts})


class BindingCLIP(comfy.sd.CLIP):
    """Encodes exactly as the CLIP it was made from; its clones (LoRA, CLIP skip) bind as well."""

    binder: Binder

    def clone(self, *args, **kwargs):
        return _with_binder(super().clone(*args, **kwargs), self.binder)

    def tokenize(self, *args, **kwargs):
        tokens = super().tokenize(*args, **kwargs)
        self.binder.note_read(tokens)
        return tokens

    def _own_texts(self, tokens) -> list[tuple[OwnText, ...]]:
        return own_texts(self, self.binder.towers, tokens, self.binder.places(tokens))

    def encode_from_tokens(self, tokens, return_pooled=False, return_dict=False):
        out = super().encode_from_tokens(tokens, return_pooled=return_pooled, return_dict=return_dict)
        text = out["cond"] if return_dict else out[0] if return_pooled else out
        self.binder.note(self, tokens, text, bare=not return_dict)
        if not return_dict:  # whoever asks so builds a conditioning of the embedding, by which it is known again
            return out
        own, bound = self._own_texts(tokens), self.binder.bind(self.binder.chunks(tokens))
        return out | {BOUND_PROMPT: replace(bound, text=text, own_texts=own[0] if own else ())}

    def encode_from_tokens_scheduled(self, tokens, unprojected=False, add_dict={}, show_pbar=True):  # noqa: B006
        conditioning = super().encode_from_tokens_scheduled(tokens, unprojected, add_dict, show_pbar)
        scheduled = [(text, extra) for text, extra in conditioning if BOUND_PROMPT not in extra]
        if scheduled:  # by LoRA hooks: the host has encoded each by itself
            own, bound = self._own_texts(tokens), self.binder.bind(self.binder.chunks(tokens))
            for number, (text, extra) in enumerate(scheduled):
                self.binder.note(self, tokens, text, bare=False)
                extra[BOUND_PROMPT] = replace(bound, text=text, own_texts=own[number] if own else ())
        return conditioning


def bind_subjects(clip: comfy.sd.CLIP, subjects: Sequence[Subject]) -> BindingCLIP:
    """Turn a fresh clone of a CLIP into one that binds these subjects.

    Raises ValueError for a word that holds nothing to bind to.
    """
    return _with_binder(clip, Binder(clip, subjects))


def _with_binder(clip: comfy.sd.CLIP, binder: Binder) -> BindingCLIP:
    clip.__class__ = BindingCLIP
    clip.binder = binder
    return clip


def _fingerprint(piece: Tensor) -> bytes:
    """Of an embedding [1, T, D]."""
    return hashlib.sha256(piece.detach().float().cpu().contiguous().numpy().tobytes()).digest()


def _forget_the_oldest(known: OrderedDict, most: int) -> None:
    while len(known) > most:
        known.popitem(last=False)


def _appended(own: Tensor, appended: Tensor) -> Tensor:
    """Both [1, T, D]."""
    return torch.cat([own, appended.to(own)], dim=1)
