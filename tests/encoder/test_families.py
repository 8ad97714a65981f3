"""Model types that are made of Llama's layers: each gives what transformers and sentence-transformers give."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import (
    AutoModel,
    AutoTokenizer,
    LlamaModel,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3Model,
)

from drama_dist.encoder.backbone import load
from drama_dist.encoder.families import with_llamas_layers
from drama_dist.encoder.model_check import check_llama
from drama_dist.export.stage import write_sentence_transformers
from drama_dist.run.runner import make
from drama_dist.settings import EncoderSettings, Settings
from tests.conftest import padded_vectors

CONTRACT = EncoderSettings(query_prefix="", max_query_tokens=16, max_passage_tokens=24, dims=[48, 16])
TEXTS = ["The bread has flour", "x", "matrix " * 60, "", "The river number 3 flows to the delta with water."]


def test_packed_vectors_equal_those_of_a_padded_model(family: Path) -> None:
    encoder = load(family, contract=CONTRACT)
    assert type(encoder.backbone) is (Qwen3Model if family.name == "qwen3" else LlamaModel)
    sequences = encoder.tokenize_passages(TEXTS)
    expected, otherwise = (padded_vectors(family, sequences, causal) for causal in (False, True))
    np.testing.assert_allclose(encoder.encode_passages(TEXTS), expected, atol=1e-5)
    assert np.abs(otherwise - expected).max() > 1e-3


def test_a_text_ends_with_eos_and_begins_with_bos_if_there_is_one(family: Path) -> None:
    encoder, tokenizer = load(family, contract=CONTRACT), AutoTokenizer.from_pretrained(family)
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    assert (begin == []) == family.name.startswith("qwen")
    whole, empty, cut = encoder.tokenize_queries(["the oven", "", "matrix " * 60])
    inner = tokenizer("the oven", add_special_tokens=False)["input_ids"]
    assert whole == [*begin, *inner, tokenizer.eos_token_id] and empty == [*begin, tokenizer.eos_token_id]
    assert len(cut) == 16 and cut[-1] == tokenizer.eos_token_id


def test_what_is_saved_and_exported_gives_the_same(family: Path, tmp_path: Path) -> None:
    encoder = load(family, contract=CONTRACT)
    encoder.save(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert type(again.backbone) is type(encoder.backbone)
    np.testing.assert_array_equal(again.encode_queries(TEXTS), encoder.encode_queries(TEXTS))
    write_sentence_transformers(encoder, tmp_path / "exported")
    theirs = SentenceTransformer(str(tmp_path / "exported"), device="cpu")
    np.testing.assert_allclose(theirs.encode_document(TEXTS), encoder.encode_passages(TEXTS), atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"], indirect=True)
def test_a_whole_training(family: Path, small_settings: Callable[..., Settings]) -> None:
    changes = ["train.regression_weight=1", "train.info_nce_weight=0", "train.steps=1", "prune.hidden_choice=rotation"]
    changes += ["prune.mask_steps=2", "prune.heal_steps=1", "prune.heal_tokens=64"]
    settings = small_settings(f"llm={family}", *changes, "augment.synthetic_queries=0", "encoder.dims=[16]")
    trained = load(make(settings, "train"))
    config, source = trained.backbone.config, load(family).backbone.config
    assert type(config) is type(source) and config.head_dim == source.head_dim
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (2, 32, 48)
    fitted = load(make(settings, "ridge", system="ridge")).encode_queries(["flour and yeast", "a piston and its valve"])
    assert np.abs(trained.encode_queries(["flour and yeast", "a piston and its valve"]) - fitted).max() < 0.2


def test_a_model_of_windows_has_no_more_positions_than_they_have_tokens(family: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(family, tmp_path / "windowed")
    told = {"sliding_window": 32}
    if family.name.startswith("qwen"):
        told |= {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **told}))
    windowed = not family.name.startswith("llama")
    encoder = load(folder, contract=CONTRACT)
    assert encoder.backbone.config.max_position_embeddings == (32 if windowed else 512)
    np.testing.assert_array_equal(
        encoder.encode_passages(TEXTS), load(family, contract=CONTRACT).encode_passages(TEXTS)
    )
    if windowed:
        causal = load(folder, contract=replace(CONTRACT, max_passage_tokens=32), bidirectional=False)
        theirs = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
        ids = causal.tokenize_passages(["matrix " * 60])
        with torch.no_grad():
            expected = theirs(torch.tensor(ids)).last_hidden_state.mean(1)
        expected = torch.nn.functional.normalize(expected, dim=1).numpy()
        np.testing.assert_allclose(causal.encode_passages(["matrix " * 60]), expected, atol=1e-5)


def test_a_window_that_no_layer_has_is_none() -> None:
    plain = Qwen2Config(max_position_embeddings=64, sliding_window=8, use_sliding_window=False)
    beyond = Qwen3Config(max_position_embeddings=64, sliding_window=8, use_sliding_window=True, max_window_layers=32)
    for config in (plain, beyond, MistralConfig(max_position_embeddings=64, sliding_window=None)):
        found = with_llamas_layers(config)
        assert found is not None and found.max_position_embeddings == 64


@pytest.mark.parametrize("family", ["qwen2"], indirect=True)
@pytest.mark.parametrize("name", ["q_proj.bias", "o_proj.weight"])
def test_only_the_biases_that_qwen2_has_not_may_be_missing(name: str, family: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(family, tmp_path / "damaged")
    weights = load_file(folder / "model.safetensors")
    del weights[f"model.layers.1.self_attn.{name}"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"the weights lack .*{name}"):
        load(folder)
    with pytest.raises(ValueError, match=rf"the weights lack .*{name}"):
        check_llama(str(folder))
    check_llama(str(family))
