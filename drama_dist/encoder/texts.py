"""Texts as a caller passes them, and their token ids.

Covers what counts as a sequence of texts, and tokenisation that several threads may share. How the tokenizer is
configured is in contract.py.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence, Set
from typing import Any

from transformers import PreTrainedTokenizerBase

from drama_dist.encoder import cut_texts


def as_texts(texts: Any) -> list[str]:
    """The texts of a list, tuple, iterator, numpy array, or column of pandas or datasets, in order.

    Raises TypeError for one text by itself, for what has no order or no single column, and where an element is not
    text; ValueError where an element is not Unicode (a lone surrogate). Both name the position.
    """
    if isinstance(texts, str | bytes | bytearray):
        raise TypeError(f"texts: expected a list of texts, found one {type(texts).__name__}; pass [text]")
    if isinstance(texts, Mapping | Set) or getattr(texts, "ndim", 1) != 1:
        raise TypeError(f"texts: expected a list of texts, found {_kind(texts)}; pass one column, or a list")
    try:
        found = list(texts)
    except TypeError:
        raise TypeError(f"texts: expected a list of texts, found {_kind(texts)}") from None
    return [_text(position, text) for position, text in enumerate(found)]


def _text(position: int, text: Any) -> str:
    if not isinstance(text, str):
        raise TypeError(f"texts: expected text at position {position}, found {_kind(text)}: {_shown(text)}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"texts: the text at position {position} is not Unicode: a lone surrogate, {text[error.start]!r}, at its "
            f"character {error.start}"
        ) from None
    return text


def _kind(value: Any) -> str:
    shape = getattr(value, "shape", ())
    return f"{type(value).__name__} of shape {tuple(shape)}" if shape else type(value).__name__


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class TextTokenizer:
    """Token ids of texts, with the special tokens that the tokenizer puts around them.

    Several threads may use it at once: a limit is no state of the tokenizer, as it is of transformers'. It has its own
    copy of the backend, which calls of the tokenizer, and of others that share it, do not change.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = tokenizer.split_special_tokens  # as every call of the tokenizer sets it

    def __call__(self, texts: Sequence[str], limit: int) -> list[list[int]]:
        """Token ids of each text; of one with more than `limit` the first limit − 1, and the last, which is EOS."""
        whole = [encoding.ids for encoding in self._backend.encode_batch(list(texts))]
        cut_texts.note(map(len, whole), limit)
        return [ids if len(ids) <= limit else [*ids[: limit - 1], ids[-1]] for ids in whole]
