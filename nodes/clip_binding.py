"""A CLIP that notes, as it encodes a prompt, which token positions carry which subject."""

from collections.abc import Sequence

import comfy.sd

from ..moa_core.binding import BoundPrompt, bind
from ..moa_core.subject import Subject

BOUND_PROMPT = "moa_bound_prompt"
"""Key of the BoundPrompt in a conditioning's dictionary."""


class BindingCLIP(comfy.sd.CLIP):
    """Encodes exactly as the CLIP it was made from; its clones (LoRA, CLIP skip) bind as well."""

    subjects: Sequence[Subject]
    words: Sequence[Sequence[int]]
    """Each subject's word as token ids."""

    def clone(self, *args, **kwargs):
        return bind_subjects(super().clone(*args, **kwargs), self.subjects)

    def encode_from_tokens(self, tokens, return_pooled=False, return_dict=False):
        out = super().encode_from_tokens(tokens, return_pooled=return_pooled, return_dict=return_dict)
        return out | {BOUND_PROMPT: self.bind(tokens)} if return_dict else out

    def encode_from_tokens_scheduled(self, tokens, unprojected=False, add_dict={}, show_pbar=True):  # noqa: B006
        add_dict = {**add_dict, BOUND_PROMPT: self.bind(tokens)}
        return super().encode_from_tokens_scheduled(tokens, unprojected, add_dict, show_pbar)

    def bind(self, tokens: dict[str, list]) -> BoundPrompt:
        """Bindings for a tokenized prompt: {"l": chunks of (token, weight)}."""
        tokenizer = clip_l_tokenizer(self)
        width = tokenizer.embedding_size
        # An embedding of another width is dropped by the encoder, and what follows it moves up.
        chunks = [[t[0] for t in chunk if isinstance(t[0], int) or t[0].shape[-1] == width] for chunk in tokens["l"]]
        return bind(self._text(chunks), chunks, self.words, self.subjects, self._ends_word)

    def _ends_word(self, token: int) -> bool:
        return not self._is_text(token) or clip_l_tokenizer(self).inv_vocab[token].endswith("</w>")

    def _word_ids(self, word: str) -> list[int]:
        chunk = self.tokenize(word)["l"][0]
        ids = [token for token, *_ in chunk if isinstance(token, int) and self._is_text(token)]
        if not ids:
            raise ValueError(
                f"MoA Patch Model: the word '{word}' of a subject has no token of text. Enter an ordinary word in "
                "Subject Encoder: man"
            )
        return ids

    def _is_text(self, token: int) -> bool:
        tokenizer = clip_l_tokenizer(self)
        return token not in (tokenizer.start_token, tokenizer.end_token, tokenizer.pad_token)

    def _text(self, chunks: list[list]) -> str:
        """The prompt as the encoder sees it, for messages."""
        vocabulary = clip_l_tokenizer(self).inv_vocab
        pieces = [
            vocabulary[token] if isinstance(token, int) else "<embedding></w>"
            for chunk in chunks
            for token in chunk
            if not isinstance(token, int) or self._is_text(token)
        ]
        return "".join(pieces).replace("</w>", " ").strip()


def bind_subjects(clip: comfy.sd.CLIP, subjects: Sequence[Subject]) -> BindingCLIP:
    """Turn a fresh clone of a CLIP into one that binds these subjects.

    Raises ValueError for a word that holds nothing to bind to.
    """
    clip.__class__ = BindingCLIP
    clip.subjects = subjects
    clip.words = [clip._word_ids(subject.word) for subject in subjects]
    return clip


def clip_l_tokenizer(clip: comfy.sd.CLIP):
    """The CLIP-L tokenizer of an SD 1.x CLIP; None for any other kind of text encoder."""
    tokenizer = clip.tokenizer
    return getattr(tokenizer, "clip_l", None) if getattr(tokenizer, "clip", None) == "clip_l" else None
