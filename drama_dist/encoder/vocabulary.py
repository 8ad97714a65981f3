"""Vocabulary pruning: which of an LLM's tokens an encoder keeps, and its tokenizer and embeddings with these alone.

Embeddings are most of a small encoder. Tokens with capitals cannot come where the tokenizer folds letters, and a corpus
uses but a part of the others. Covers byte-pair encoding (Sennrich, Haddow and Birch 2016), with bytes as letters or to
fall back on: single letters and bytes are always kept, so any text still encodes, and a token that is gone comes in
pieces. Does not cover which texts count; the stage says.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from copy import deepcopy
from itertools import islice
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.normalizers import Lowercase
from torch import nn
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from drama_dist.encoder.families import Backbone
from drama_dist.run.progress import Progress

_BATCH = 1024  # texts that are tokenised at once
_NO_TEXT = "\ufffd"
_MAKE_CAPITALS = {"NFKC", "NFKD", "Nmt", "Precompiled"}  # normalisers: of ™ and ℃, for example, after the folding


def is_prunable(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether tokens can be taken out of it: it must be one of byte-pair encoding without marks inside words."""
    model = _state(tokenizer)["model"]
    return model["type"] == "BPE" and not model["continuing_subword_prefix"] and not model["end_of_word_suffix"]


def check_prunable(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError where `is_prunable` says that it is not."""
    if not is_prunable(tokenizer):
        raise ValueError(
            f"{tokenizer.name_or_path}: its tokenizer is not one of byte-pair encoding, of which tokens can be left "
            "out; set prune.vocabulary=whole"
        )


def reachable_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the tokens that texts can have where letters are folded first: those without a capital, and parts of
    characters. All where the tokenizer's own normaliser may make capitals, or does not say what its tokens stand for.
    """
    state, decoder = _state(tokenizer), tokenizer.backend_tokenizer.decoder
    vocabulary = _vocabulary(tokenizer)
    if _types(state["normalizer"]) & _MAKE_CAPITALS or decoder is None:
        return set(vocabulary.values())
    fold = Lowercase().normalize_str
    texts = {id: decoder.decode([name]) for name, id in vocabulary.items()}
    return {id for id, text in texts.items() if _NO_TEXT in text or fold(text) == text}


def used_tokens(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], progress: Progress | None = None) -> set[int]:
    """Ids of the tokens that the texts have, and their words by themselves, with a space before them and without.

    progress: told the number of texts that were read.
    """
    backend = deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    texts, found, words = iter(texts), set[int](), set[str]()
    while batch := list(islice(texts, _BATCH)):
        words.update(*map(str.split, batch))
        found.update(*_ids(backend, batch))
        if progress is not None:
            progress(len(batch))
    alone = iter(sorted(words))
    while batch := list(islice(alone, _BATCH)):
        found.update(*_ids(backend, [*batch, *(f" {word}" for word in batch)]))
    return found


def with_tokens(tokenizer: PreTrainedTokenizerBase, wanted: set[int]) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """A tokenizer with the wanted tokens, and the old ids of all that it has, in the order of the new ones.

    It also has the special tokens, the single letters and bytes, and all that the wanted tokens can be merged from.
    Texts that had no other tokens have the same as before. What stands around texts is the caller's to set. Raises as
    `check_prunable`.
    """
    check_prunable(tokenizer)
    state = _state(tokenizer)
    model, added = state["model"], state["added_tokens"]
    parts_of: dict[str, list[str]] = {}
    for left, right in model["merges"]:
        parts_of.setdefault(left + right, []).extend((left, right))
    kept = {name for name, id in model["vocab"].items() if id in wanted or name not in parts_of}
    kept.update(token["content"] for token in added)
    waiting = list(kept)
    while waiting:
        new = [part for part in parts_of.get(waiting.pop(), ()) if part not in kept]
        kept.update(new)
        waiting += new
    old_ids = sorted({id for name, id in model["vocab"].items() if name in kept} | {token["id"] for token in added})
    new_id = {old: new for new, old in enumerate(old_ids)}
    model["vocab"] = {name: new_id[id] for name, id in model["vocab"].items() if name in kept}
    model["merges"] = [pair for pair in model["merges"] if kept.issuperset((*pair, "".join(pair)))]
    state["added_tokens"] = [{**token, "id": new_id[token["id"]]} for token in added]
    state["post_processor"] = state["padding"] = state["truncation"] = None  # these have old ids in them
    smaller = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=tokenizer.clean_up_tokenization_spaces,
        split_special_tokens=tokenizer.split_special_tokens,
        name_or_path=tokenizer.name_or_path,
        **tokenizer.special_tokens_map,
    )
    return smaller, old_ids


@torch.no_grad()
def keep_embeddings(backbone: Backbone, old_ids: list[int]) -> None:
    """Give a backbone the embeddings of these tokens alone, in this order."""
    config = backbone.config
    rows_VK = backbone.embed_tokens.weight[old_ids].clone()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        id = getattr(config, name, None)
        first = id[0] if isinstance(id, list) and id else id
        setattr(config, name, old_ids.index(first) if first in old_ids else None)
    config.vocab_size = backbone.vocab_size = len(old_ids)
    backbone.padding_idx = config.pad_token_id
    backbone.set_input_embeddings(nn.Embedding(len(old_ids), config.hidden_size, config.pad_token_id, _weight=rows_VK))


def _state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return state


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    vocabulary: dict[str, int] = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True)
    return vocabulary


def _ids(backend: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False)]


def _types(normalizer: dict[str, Any] | None) -> set[str]:
    if normalizer is None:
        return set()
    return {normalizer["type"]}.union(*map(_types, normalizer.get("normalizers", ())))
