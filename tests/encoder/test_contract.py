"""The contract in a model's folder, and small letters: the same vectors in every program that loads the tokenizer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from tokenizers import AddedToken, normalizers
from transformers import AutoTokenizer

from drama_dist.augment.writers.local import LocalWriter
from drama_dist.encoder.backbone import Encoder, load
from drama_dist.encoder.contract import as_encoded, read_contract, save_tokenizer, wire_tokenizer
from drama_dist.encoder.texts import TextTokenizer
from drama_dist.export.stage import write_sentence_transformers
from drama_dist.settings import EncoderSettings, EncodeSettings
from tests.conftest import save_llama, train_tokenizer

CAPITALS, SMALL = ["THE BREAD Rises", "É"], ["the bread rises", "é"]


def contract(lower_case: bool) -> EncoderSettings:
    return EncoderSettings(query_prefix="Query: ", passage_prefix="TEXT ", lower_case=lower_case, dims=[48])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Its tokenizer's class builds the backend anew when it is loaded, without the normaliser of tokenizer.json."""
    shape = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 1}
    room_for_gpt2s_own = {"vocab_size": 512}
    folder = save_llama(tmp_path / "model", train_tokenizer(), **shape, **room_for_gpt2s_own)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tokenizer_class": "GPT2Tokenizer"}))
    return folder


@pytest.mark.parametrize("lower_case", [True, False])
def test_capitals_are_small_letters_wherever_the_model_is_loaded(lower_case: bool, model: Path, tmp_path: Path) -> None:
    encoder = load(model, contract=contract(lower_case))
    write_sentence_transformers(encoder, tmp_path / "exported")
    again = load(tmp_path / "exported")
    theirs = SentenceTransformer(str(tmp_path / "exported"), device="cpu")
    assert again.contract == encoder.contract
    for encode, others in (
        (encoder.encode_queries, (again.encode_queries, theirs.encode_query)),
        (encoder.encode_passages, (again.encode_passages, theirs.encode_document)),
    ):
        expected = encode(CAPITALS)
        difference = np.abs(expected - encode(SMALL)).max()
        assert difference == 0 if lower_case else difference > 1e-2
        for other in others:
            np.testing.assert_allclose(other(CAPITALS), expected, atol=1e-5)
            np.testing.assert_allclose(other(SMALL), encode(SMALL), atol=1e-5)


def test_folding_comes_first_and_once(tmp_path: Path) -> None:
    tokenizer = train_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    for _ in range(3):
        wire_tokenizer(tokenizer, lower_case=True)
        assert str(tokenizer.backend_tokenizer.normalizer) == "Sequence(normalizers=[Lowercase(), NFKC()])"
        save_tokenizer(tokenizer, tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert str(wire_tokenizer(tokenizer, False).backend_tokenizer.normalizer).count("Lowercase") == 1
    assert wire_tokenizer(train_tokenizer(), lower_case=False).backend_tokenizer.normalizer is None


def test_special_tokens_keep_their_capitals(tmp_path: Path) -> None:
    tokenizer = train_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<BOS>", "eos_token": "<EOS>"})
    tokenizer.add_tokens([AddedToken("<Found-In-Normalised-Text>", normalized=True)])
    wire_tokenizer(tokenizer, lower_case=True)
    save_tokenizer(tokenizer, tmp_path)
    for ours in (TextTokenizer(tokenizer), TextTokenizer(AutoTokenizer.from_pretrained(tmp_path))):
        bos, word, eos = tokenizer.convert_tokens_to_ids(["<BOS>", "<Found-In-Normalised-Text>", "<EOS>"])
        (inside, small, normalised) = ours(["<EOS>", "<eos>", "<FOUND-in-normalised-text>"], 64)
        assert inside == [bos, eos, eos] and small[0] == bos and small[-1] == eos and eos not in small[1:-1]
        assert normalised == [bos, word, eos]


@pytest.mark.parametrize(
    ("text", "folded"),
    [("CAFÉ", "café"), ("İI", "i\u0307i"), ("STRASSE ß", "strasse ß"), ("ΟΔΟΣ", "οδοσ"), ("ЩИ", "щи")],
)
def test_each_character_becomes_its_own_small_letter(text: str, folded: str) -> None:
    plain, folding = (TextTokenizer(wire_tokenizer(train_tokenizer(), lower_case)) for lower_case in (False, True))
    assert folding([text], 64) == plain([folded], 64) != plain([text], 64)


def test_models_that_do_not_say_are_left_as_they_are(model: Path, tmp_path: Path) -> None:
    assert not read_contract(model, 48).lower_case
    encoder = load(model, contract=contract(False))
    expected = encoder.encode_queries(CAPITALS)
    encoder.save(tmp_path / "older")
    file = tmp_path / "older" / "drama.json"
    declared = json.loads(file.read_text())
    del declared["lower_case"]
    file.write_text(json.dumps(declared))
    older = load(tmp_path / "older")
    assert not older.contract.lower_case
    np.testing.assert_array_equal(older.encode_queries(CAPITALS), expected)
    write_sentence_transformers(encoder, tmp_path / "foreign")
    (tmp_path / "foreign" / "drama.json").unlink()
    assert not read_contract(tmp_path / "foreign", 48).lower_case


def test_the_llm_that_writes_keeps_its_capitals(model: Path) -> None:
    assert isinstance(load(model, contract=contract(True)), Encoder)
    assert LocalWriter(str(model)).cut("Bread IS Baked", 64) == "Bread IS Baked"


def test_passages_are_read_as_far_as_asked_and_as_the_model_has_positions() -> None:
    trained = EncoderSettings(max_query_tokens=16, max_passage_tokens=64)
    for asked, positions, read in ((None, 2048, 64), (100, 2048, 100), (8192, 2048, 2048), (None, 48, 48)):
        found = as_encoded(trained, EncodeSettings(max_passage_tokens=asked), positions)
        assert found == replace(trained, max_passage_tokens=read)
