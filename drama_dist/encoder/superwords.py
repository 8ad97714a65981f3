"""Superwords: tokens for the frequent words and phrases of a corpus, beside those that a tokenizer has.

The merges of byte-pair encoding (Sennrich, Haddow and Birch 2016) are continued on a corpus's own token sequences, over
the spaces between words too (as in SuperBPE, Liu et al. 2025, arXiv 2503.13423). Texts become shorter, and what a
phrase means need not be the sum of what its words mean. For merges over spaces the tokenizer has to cut texts into
larger pieces. These are GPT-2's, joined: the old tokens of a text stay the same where the tokenizer's own pieces are
GPT-2's, and nearly the same elsewhere. But a text's first word becomes the token that it is further on, with a space
before it. Covers learning superwords and adding them to a tokenizer; their embeddings are the caller's, see
train/token_vectors.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from itertools import groupby, islice
from typing import Any

from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.normalizers import Prepend, Strip
from tokenizers.normalizers import Sequence as Normalizers
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as InTurn
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerBase

_LEAST = 5  # times that a superword has to be in the texts
_BATCH = 1024  # texts that are tokenised at once
_LETTERS = r"[\p{L}\p{M}]+"
# GPT-2's pieces, but that marks count as letters, and words with single spaces between them are one piece.
_PIECES = rf"'(?:[sdmt]|ll|ve|re)| ?{_LETTERS}(?: {_LETTERS})*| ?\p{{N}}+| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+|\s+(?!\S)|\s+"
_FIRST = 0x10000  # the character that stands for token 0 while merges are learned: from here on none is a surrogate


def add_superwords(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], most: int, first_id: int
) -> list[list[int]]:
    """Change a tokenizer to have up to `most` superwords of these texts, with ids from first_id on.

    first_id: above all ids of tokens. Each superword joins two tokens, old ones or superwords; those that are learned
    first are the most frequent. Returns, for each, the old tokens that it stands for. Raises ValueError as
    `check_byte_level` does.
    """
    if not most:
        return []
    backend = tokenizer.backend_tokenizer
    check_byte_level(tokenizer)
    before = [] if backend.normalizer is None else [backend.normalizer]
    backend.normalizer = Normalizers([*before, Strip(right=False), Prepend(" ")])
    backend.pre_tokenizer = InTurn([Split(Regex(_PIECES), "isolated"), ByteLevel(False, use_regex=False)])
    merges = _learned(_pieces(backend, texts), first_id + most)[:most]
    state = json.loads(backend.to_str())
    for id, token in backend.get_added_tokens_decoder().items():
        # What is not in the vocabulary gets an id anew when the tokenizer is loaded: the next one after the vocabulary.
        state["model"]["vocab"].setdefault(token.content, id)
    parts = _put(state["model"], merges, first_id)
    backend.model = Tokenizer.from_str(json.dumps(state)).model
    return parts


def check_byte_level(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError where the tokenizer is not one of byte-level byte-pair encoding, which superwords need."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    pieces = state["pre_tokenizer"] or {}
    last = (pieces.get("pretokenizers") or [pieces])[-1]
    if state["model"]["type"] != "BPE" or last.get("type") != "ByteLevel":
        raise ValueError(
            f"{tokenizer.name_or_path}: its tokenizer is not one of byte-level byte-pair encoding, which superwords "
            "need; set train.superwords=0"
        )


def _pieces(backend: Tokenizer, texts: Iterable[str]) -> Iterator[list[int]]:
    """The tokens within which merges may happen: of a phrase, a number or signs."""
    texts, plain = iter(texts), deepcopy(backend)
    plain.no_truncation()
    plain.no_padding()
    while batch := list(islice(texts, _BATCH)):
        for encoding in plain.encode_batch(batch, add_special_tokens=False):
            for _, tokens in groupby(zip(encoding.word_ids, encoding.ids, strict=True), key=lambda pair: pair[0]):
                yield [id for _, id in tokens]


def _learned(pieces: Iterable[Sequence[int]], vocabulary: int) -> list[tuple[list[int], list[int]]]:
    """Merges in order: of which two sequences of old tokens. vocabulary: at most so many single tokens and merges."""
    learner = Tokenizer(BPE())
    words = ("".join(chr(_FIRST + id) for id in piece) for piece in pieces if len(piece) > 1)
    learner.train_from_iterator(words, BpeTrainer(vocab_size=vocabulary, min_frequency=_LEAST, show_progress=False))
    merges = json.loads(learner.to_str())["model"]["merges"]
    return [([ord(each) - _FIRST for each in left], [ord(each) - _FIRST for each in right]) for left, right in merges]


def _put(model: dict[str, Any], merges: Sequence[tuple[list[int], list[int]]], first_id: int) -> list[list[int]]:
    vocabulary = model["vocab"]
    name_of = {id: name for name, id in vocabulary.items()}
    parts: list[list[int]] = []
    for left, right in merges:
        names = ["".join(name_of[id] for id in ids) for ids in (left, right)]
        model["merges"].append(names)
        if "".join(names) not in vocabulary:  # which it is where other merges lead to the same letters
            vocabulary["".join(names)] = first_id + len(parts)
            parts.append([*left, *right])
    return parts
