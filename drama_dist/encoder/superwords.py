"""Superwords: tokens for the frequent words and phrases of a corpus, beside those that a tokenizer has.

The merges of byte-pair encoding (Sennrich, Haddow and Birch 2016) are continued on a corpus's own token sequences, over
the spaces between words too (as in SuperBPE, Liu et al. 2025, arXiv 2503.13423). Texts become shorter, and what a
phrase means need not be the sum of what its words mean. Covers learning them and adding them to a tokenizer; their
embeddings are the caller's, see train/token_vectors.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from typing import Any

from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as InTurn
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerBase

_LEAST = 5  # of a superword in the corpus
_BATCH = 1024  # texts
_LETTERS = r"[\p{L}\p{M}]+"
# GPT-2's pieces of a text, but that words with single spaces between them are one piece.
_PIECES = rf"'(?:[sdmt]|ll|ve|re)| ?{_LETTERS}(?: {_LETTERS})*| ?\p{{N}}+| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+|\s+(?!\S)|\s+"
_FIRST = 0x10000  # the character that stands for token 0, where merges are learned; there is room for 10^6 tokens


def add_superwords(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], most: int, first_id: int
) -> list[list[int]]:
    """Change a tokenizer to have up to `most` superwords of these texts, with ids from first_id on.

    Each is in the texts 5 times at least, and one merge longer than others or than tokens that were there before.
    Returns, for each, the old tokens that it stands for. Raises ValueError where the tokenizer is not one of byte-level
    byte-pair encoding.
    """
    backend = tokenizer.backend_tokenizer
    if not most:
        return []
    if not _is_byte_level(json.loads(backend.to_str())):
        raise ValueError(
            f"{tokenizer.name_or_path}: superwords need a tokenizer of byte-level byte-pair encoding, which it is not; "
            "set train.superwords=0"
        )
    backend.pre_tokenizer = InTurn([Split(Regex(_PIECES), "isolated"), ByteLevel(False, use_regex=False)])
    merges = _learned(_pieces(backend, texts), most)
    state = json.loads(backend.to_str())
    parts = _put(state["model"], merges, first_id)
    backend.model = Tokenizer.from_str(json.dumps(state)).model
    return parts


def _is_byte_level(state: dict[str, Any]) -> bool:
    pieces = state["pre_tokenizer"] or {}
    steps = pieces.get("pretokenizers", [pieces])
    return state["model"]["type"] == "BPE" and [step.get("type") for step in steps][-1:] == ["ByteLevel"]


def _pieces(backend: Tokenizer, texts: Iterable[str]) -> Iterator[list[int]]:
    """The tokens within which merges may happen: of words and phrases, not of numbers and signs."""
    texts = iter(texts)
    while batch := list(islice(texts, _BATCH)):
        for encoding in backend.encode_batch(batch, add_special_tokens=False):
            for _, tokens in groupby(zip(encoding.word_ids, encoding.ids, strict=True), key=lambda pair: pair[0]):
                yield [id for _, id in tokens]


def _learned(pieces: Iterable[Sequence[int]], most: int) -> list[tuple[list[int], list[int]]]:
    """Merges in order: of which two sequences of old tokens."""
    learner = Tokenizer(BPE())
    words = ("".join(chr(_FIRST + id) for id in piece) for piece in pieces if len(piece) > 1)
    # The vocabulary that is asked for counts single tokens too, whose number is not known yet.
    trainer = BpeTrainer(vocab_size=0x10FFFF, min_frequency=_LEAST, show_progress=False)
    learner.train_from_iterator(words, trainer)
    merges = json.loads(learner.to_str())["model"]["merges"][:most]
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
