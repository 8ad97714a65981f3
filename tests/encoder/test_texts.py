"""Texts that the Python API takes and refuses, and tokens that threads may share."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from drama_dist.encoder.backbone import Encoder, load
from drama_dist.encoder.contract import wire_tokenizer
from drama_dist.encoder.pooling import checked_dim
from drama_dist.encoder.texts import TextTokenizer, as_texts
from drama_dist.settings import EncoderSettings
from tests.conftest import save_llama, train_tokenizer

TWO = ["the bread", "a river"]
HARD = [
    "",
    " ",
    "x",
    "</s> a </s>",
    "<s>",
    "naïve 矩阵 🙂 \U0001f468‍\U0001f469‍\U0001f467",
    "a\x00b\n\tc",
    "matrix " * 300,
]
CONTRACT = EncoderSettings(max_query_tokens=16, max_passage_tokens=64, dims=[48])


@pytest.mark.parametrize(
    "texts",
    [
        TWO,
        tuple(TWO),
        iter(TWO),
        (text for text in TWO),
        np.array(TWO),
        np.array(TWO, dtype=object),
        pandas.Series(TWO),
        pandas.Series(TWO, index=[7, 3], dtype="string"),
        pandas.DataFrame({"text": TWO})["text"],
        Dataset.from_dict({"text": TWO})["text"],
        {"a": TWO[0], "b": TWO[1]}.values(),
    ],
)
def test_sequences_of_texts_are_taken_in_their_order(texts: Any) -> None:
    assert as_texts(texts) == TWO
    assert as_texts([]) == as_texts(np.array([], dtype=str)) == []


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("one text", "expected a list of texts, found one str; pass [text]"),
        (np.str_("one"), "found one str_; pass [text]"),
        (b"bytes", "found one bytes"),
        (None, "found NoneType"),
        (5, "found int"),
        (float("nan"), "found float"),
        (Path("a"), "found PosixPath"),
        ({"a", "b"}, "found set"),
        ({"text": "a"}, "found dict"),
        (np.array("one"), "found ndarray"),
        (np.array([TWO]), "found ndarray of shape (1, 2)"),
        (pandas.DataFrame({"text": TWO}), "found DataFrame of shape (2, 1); pass one column"),
        ([TWO], "expected text at position 0, found list: ['the bread', 'a river']"),
        (["a", None], "expected text at position 1, found NoneType: None"),
        (pandas.Series(["a", None]), "expected text at position 1, found"),
        (pandas.Series(["a", pandas.NA], dtype="string"), "expected text at position 1, found"),
        ([b"a"], "expected text at position 0, found bytes: b'a'"),
        ([1, 2], "expected text at position 0, found int: 1"),
        (torch.tensor([1, 2]), "expected text at position 0, found Tensor"),
        (Dataset.from_dict({"text": TWO}), "expected text at position 0, found dict"),
    ],
)
def test_anything_else_is_a_type_error_that_names_it(texts: Any, message: str) -> None:
    with pytest.raises(TypeError, match=rf"^texts: .*{re.escape(message)}"):
        as_texts(texts)


def test_a_lone_surrogate_is_named_with_its_place() -> None:
    with pytest.raises(ValueError, match=r"^texts: the text at position 1 is not Unicode: .*'\\ud83d', at"):
        as_texts(["fine \U0001f642", "a \ud83d b"])


@pytest.mark.parametrize(("dim", "kept"), [(None, 48), (1, 1), (48, 48), (np.int64(7), 7)])
def test_a_dim_is_from_1_to_the_size(dim: Any, kept: int) -> None:
    assert checked_dim(dim, 48) == kept


@pytest.mark.parametrize("dim", [0, -1, 49, 10**30, np.int64(0)])
def test_a_dim_out_of_range_is_named(dim: Any) -> None:
    with pytest.raises(ValueError, match=rf"^dim={dim}: these vectors have 48 components"):
        checked_dim(dim, 48)


@pytest.mark.parametrize("dim", [16.0, "16", True, [16], np.float32(16), float("nan")])
def test_a_dim_that_is_no_whole_number_is_a_type_error(dim: Any) -> None:
    with pytest.raises(TypeError, match=r"^dim=.*: must be a whole number"):
        checked_dim(dim, 48)


@pytest.mark.parametrize("limit", [3, 4, 17, 64, 10_000])
def test_tokens_are_those_of_transformers_own_truncation(limit: int) -> None:
    tokenizer = wire_tokenizer(train_tokenizer(), lower_case=limit % 2 == 0)
    ours = TextTokenizer(tokenizer)
    expected = tokenizer(HARD, truncation=True, max_length=limit, return_attention_mask=False)["input_ids"]
    assert ours(HARD, limit) == expected and ours([], limit) == []
    assert [ours([text], limit)[0] for text in HARD] == expected


def test_what_others_do_with_the_tokenizer_changes_nothing() -> None:
    tokenizer = wire_tokenizer(train_tokenizer(), lower_case=True)
    ours = TextTokenizer(tokenizer)
    before = ours(HARD, 64)
    tokenizer(HARD, truncation=True, max_length=5, padding="longest")
    assert len(tokenizer.backend_tokenizer.encode(HARD[-1]).ids) == 5  # of the tokenizer it is state
    assert ours(HARD, 64) == before


@pytest.fixture(params=["plain", "dynamic"])
def encoder(request: pytest.FixtureRequest, llm: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Encoder:
    """Also one whose rotary embeddings change with the longest text."""
    if request.param == "plain":
        return load(llm, contract=CONTRACT)
    rope: Any = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    shape = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 20}
    return load(save_llama(tmp_path / "dynamic", tokenizer, **shape, rope_parameters=rope), contract=CONTRACT)


def test_threads_that_share_an_encoder_get_the_vectors_of_one(encoder: Encoder) -> None:
    texts = ["row column inverse rank " * 60] * 3
    calls: list[Callable[[], np.ndarray]] = [
        lambda: encoder.encode_passages(texts),
        lambda: encoder.encode_queries(texts),
    ]
    expected = [call() for call in calls]
    assert np.abs(expected[0] - expected[1]).max() > 1e-3
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: calls[number % 2](), range(400)))
    for number, vectors in enumerate(found):
        np.testing.assert_allclose(vectors, expected[number % 2], atol=1e-5)


def test_rotary_embeddings_that_change_with_the_texts_have_one_user_at_a_time(encoder: Encoder) -> None:
    inside, most = 0, 0

    def enter(*_: Any) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.01)

    def leave(*_: Any) -> None:
        nonlocal inside
        inside -= 1

    encoder.backbone.rotary_emb.register_forward_pre_hook(enter)
    encoder.backbone.rotary_emb.register_forward_hook(leave)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(encoder.encode_queries, [TWO] * 20))
    assert (most == 1) == (encoder.backbone.rotary_emb.rope_type == "dynamic")


def test_the_encoder_refuses_what_is_not_a_list_of_texts(llm: Path) -> None:
    encoder = load(llm, contract=CONTRACT)
    for encode in (encoder.encode_queries, encoder.encode_passages):
        with pytest.raises(TypeError, match=r"found one str; pass \[text\]"):
            encode("how do I invert a matrix")
        with pytest.raises(ValueError, match="dim=0: these vectors have 48 components"):
            encode(TWO, dim=0)
        np.testing.assert_array_equal(encode(np.array(TWO)), encode(TWO))
        np.testing.assert_array_equal(encode(pandas.Series(TWO)), encode(iter(TWO)))
