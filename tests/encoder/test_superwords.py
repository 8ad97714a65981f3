"""Superwords: merges go on where the tokenizer's end, and texts keep their content."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from drama_dist.encoder.contract import save_tokenizer, wire_tokenizer
from drama_dist.encoder.superwords import add_superwords

TEXTS = [
    "The finite difference method, in short. A finite difference of order 7007, and a finite difference again!",
    "Finite  difference methods aren't everything: the river bank isn't one.\nRiver bank, river bank; 12 river banks.",
    "नमस्ते दुनिया, नमस्ते दुनिया। 東京都 東京都",
] * 5


@pytest.fixture
def tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """One that a test may change."""
    return deepcopy(tokenizer)


def plain(ids: list[int], parts: list[list[int]], first: int) -> list[int]:
    """With each superword as the tokens that it stands for."""
    return [old for id in ids for old in ([id] if id < first else parts[id - first])]


def tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def test_texts_are_shorter_and_say_the_same(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    first = len(tokenizer) + 7  # an LLM has more rows of embeddings than tokens
    wire_tokenizer(tokenizer, lower_case=True)
    before = [tokens(tokenizer, f" {text}") for text in TEXTS]
    parts = add_superwords(tokenizer, TEXTS, 1000, first)
    after = [tokens(tokenizer, text) for text in TEXTS]
    assert len(parts) > 20 and all(len(old) > 1 for old in parts)
    for short, long in zip(after, before, strict=True):
        assert len(short) < 0.6 * len(long)
        assert plain(short, parts, first) == long  # where old merges look no further than a word
    names = {tokenizer.decode([first + row]) for row in range(len(parts))}
    assert {" finite difference", " river bank", " नमस्ते दुनिया"} <= names
    assert " 7007" in names and not any("," in name or "\n" in name or "7 " in name for name in names)
    assert max(map(max, after)) == first + len(parts) - 1

    wired = wire_tokenizer(tokenizer, lower_case=True)
    save_tokenizer(wired, tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert [tokens(again, text) for text in TEXTS] == after
    assert tokens(again, "unseen words, as before") == tokens(tokenizer, "unseen words, as before")
    assert again.decode(tokens(again, TEXTS[1].lower())) == f" {TEXTS[1].lower()}"
    assert tokens(again, "river bank") == tokens(again, " river bank") == tokens(again, "a river bank")[-1:]
    assert tokens(again, "") == []


def test_as_many_as_are_asked_for_the_most_frequent_first(tokenizer: PreTrainedTokenizerFast) -> None:
    many, few = (Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()) for _ in range(2))
    found = []
    for backend, most in ((many, 1000), (few, 3)):
        wrapped = PreTrainedTokenizerFast(tokenizer_object=backend)
        found.append(add_superwords(wrapped, TEXTS, most, 5000))
    assert found[1] == found[0][:3]


def test_what_is_rare_is_no_superword(tokenizer: PreTrainedTokenizerFast) -> None:
    assert add_superwords(deepcopy(tokenizer), ["the river"] * 4, 1000, 5000) == []
    assert len(add_superwords(deepcopy(tokenizer), ["the river"] * 5, 1000, 5000)) > 0
    assert add_superwords(tokenizer, [], 1000, 5000) == []


@pytest.mark.parametrize("first", [400, 800])
def test_special_tokens_beyond_the_vocabulary_keep_their_ids(tmp_path: Path, first: int) -> None:
    """As of Llama 3 and Qwen: they are added to the tokenizer, and not in its model's vocabulary."""
    backend = Tokenizer(models.BPE(*_bytes()))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_special_tokens(["<begin>", "<end>"])
    special = [backend.token_to_id(token) for token in ("<begin>", "<end>")]
    assert special == [256, 257]
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<begin>", eos_token="<end>")
    wire_tokenizer(wrapped, lower_case=True)
    parts = add_superwords(wrapped, TEXTS, 1000, first)
    save_tokenizer(wrapped, tmp_path)
    again = wire_tokenizer(AutoTokenizer.from_pretrained(tmp_path), lower_case=True)
    for text in TEXTS[:3]:
        ids = again(text)["input_ids"]
        assert ids == wrapped(text)["input_ids"]
        assert [ids[0], ids[-1]] == special and max(ids) >= first
        assert set(plain(ids[1:-1], parts, first)) <= set(range(256))


def _bytes() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary of single bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return {byte: id for id, byte in enumerate(alphabet)}, []


def test_truncation_and_padding_of_the_tokenizer_change_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    cut = deepcopy(tokenizer)
    cut.backend_tokenizer.enable_truncation(3)
    cut.backend_tokenizer.enable_padding(pad_id=499, pad_token="</s>", length=40)
    assert add_superwords(cut, TEXTS, 1000, 5000) == add_superwords(tokenizer, TEXTS, 1000, 5000)


def test_none_asked_for_leaves_the_tokenizer_as_it_is(tokenizer: PreTrainedTokenizerFast) -> None:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    assert add_superwords(tokenizer, TEXTS, 0, 5000) == []
    assert json.loads(tokenizer.backend_tokenizer.to_str()) == state


@pytest.mark.parametrize("model", [models.WordPiece({"[UNK]": 0}), models.BPE({"a": 0}, [])])
def test_other_tokenizers_are_refused(model: models.Model) -> None:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match=r"byte-level byte-pair encoding.*set train.superwords=0"):
        add_superwords(PreTrainedTokenizerFast(tokenizer_object=backend), TEXTS, 10, 5)
