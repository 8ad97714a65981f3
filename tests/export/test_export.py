"""Export: sentence-transformers loads the folder and gives our vectors."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from sentence_transformers import SentenceTransformer

import drama_dist
from drama_dist.export import stage as export_module
from drama_dist.export.stage import export_encoder, model_card
from drama_dist.run.runner import make
from drama_dist.settings import Settings

TEXTS = ["the bread", "THE BREAD", "x", "A longer text about a river and its banks. " * 9]


@pytest.fixture(scope="module")
def exported(
    small_settings_in: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Settings, Path]:
    changes = ["train.steps=2", "encode.max_passage_tokens=100"]  # 64 in training
    settings = small_settings_in(tmp_path_factory.mktemp("export"), *changes)
    make(settings, "evaluate")
    return settings, make(settings, "export")


def test_vectors_agree_without_remote_code(exported: tuple[Settings, Path]) -> None:
    settings, folder = exported
    ours, theirs = drama_dist.load(folder), SentenceTransformer(str(folder), device="cpu")
    assert theirs.prompts["query"] == "Query: "
    assert theirs.max_seq_length == ours.contract.max_passage_tokens == 100
    longer = [" ".join(["river"] * 70 + [end]) for end in ("bread", "salt")]  # what tells them apart comes after 64
    assert np.abs(np.subtract(*ours.encode_passages(longer))).max() > 1e-3
    assert not list(folder.rglob("*.py")) and not list(folder.rglob("*.bin"))
    assert (theirs[0].query_length, theirs[0].document_length) == (settings.encoder.max_query_tokens, 100)
    for our_encode, their_encode in (
        (ours.encode_queries, theirs.encode_query),
        (ours.encode_passages, theirs.encode_document),
    ):
        np.testing.assert_allclose(our_encode(TEXTS), their_encode(TEXTS), atol=1e-5)
        np.testing.assert_array_equal(our_encode(TEXTS[:1]), our_encode(TEXTS[1:2]))  # one at a time: rows round alike
    cut = SentenceTransformer(str(folder), device="cpu", truncate_dim=16)
    vectors = cut.encode_query(TEXTS[:2], normalize_embeddings=True)
    np.testing.assert_allclose(ours.encode_queries(TEXTS[:2], dim=16), vectors, atol=1e-5)


def test_the_folder_loads_as_one_of_sentence_transformers_own(exported: tuple[Settings, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(exported[1], tmp_path / "foreign")
    before = drama_dist.load(folder).encode_queries(TEXTS[:2])
    (folder / "drama.json").unlink()
    foreign = drama_dist.load(folder)
    assert foreign.contract.query_prefix == "Query: "
    assert (foreign.contract.max_query_tokens, foreign.contract.max_passage_tokens) == (32, 100)
    np.testing.assert_allclose(foreign.encode_queries(TEXTS[:2]), before, atol=1e-6)


def test_the_card_tells_data_settings_and_results(exported: tuple[Settings, Path]) -> None:
    settings, folder = exported
    card = (folder / "README.md").read_text("utf-8")
    for part in (
        "64 for passages.\nIt reads at most 100 tokens of a passage.",
        "2 layers × 32",
        "crop examples",
        "zero_stage: 1",
        "| drama",
        "| bm25",
        "`Query: `",
        settings.llm,
    ):
        assert part in card, part
    norwegian = replace(settings, corpus=replace(settings.corpus, language="no"))
    assert yaml.safe_load(model_card(norwegian, drama_dist.load(folder)).split("---")[1])["language"] == "no"


def test_vectors_that_differ_stop_the_export(
    exported: tuple[Settings, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, _ = exported
    encode = export_module.Encoder.encode_queries
    monkeypatch.setattr(export_module.Encoder, "encode_queries", lambda self, texts: encode(self, texts) + 1e-3)
    with pytest.raises(RuntimeError, match=r"sentence-transformers' vectors differ from ours by 1.00e-03"):
        export_encoder(settings, Path(settings.run) / "train", tmp_path / "out")
