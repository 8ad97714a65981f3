"""Systems: every dim from one encoding, BM25, and names that are two systems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from drama_dist import settings as settings_module
from drama_dist.encoder.pooling import matryoshka_cut_array
from drama_dist.run.progress import Progress
from drama_dist.run.runner import Run, make
from drama_dist.search.quantised import search_in
from drama_dist.search.shards import EmbeddingShards, TextEncoder
from drama_dist.search.systems import SYSTEMS, OtherModel, TrainedSystem, rankings, system_called
from drama_dist.settings import Settings, SettingsError


class Vectors:
    """An encoder with given vectors for queries."""

    def __init__(self, queries: np.ndarray):
        self.queries = queries

    def encode_queries(self, texts: Sequence[str], dim: int | None = None) -> np.ndarray:
        return self.queries

    def encode_passages(
        self, texts: Sequence[str], dim: int | None = None, progress: Progress | None = None
    ) -> np.ndarray:
        raise NotImplementedError


def vectors(rows: int) -> np.ndarray:
    drawn = np.random.default_rng(rows).normal(size=(rows, 8)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def test_each_dim_equals_a_ranking_by_the_cut_vectors(
    small_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, passages = vectors(2), vectors(5)
    np.save(tmp_path / "shard-00000.npy", passages[:3])
    np.save(tmp_path / "shard-00001.npy", passages[3:])
    encoder: TextEncoder = Vectors(queries)
    monkeypatch.setattr(TrainedSystem, "load", lambda self, settings: encoder)
    rankings = list(SYSTEMS["drama"].rank(small_settings("encoder.dims=[3,8]"), tmp_path, ["a", "b"], 4))
    assert [ranking.dim for ranking in rankings] == [8, 3]
    for ranking in rankings:
        cut_q, cut_p = (rows[:, : ranking.dim].astype(np.float64) for rows in (queries, passages))
        cut_q /= np.linalg.norm(cut_q, axis=1, keepdims=True)
        cut_p /= np.linalg.norm(cut_p, axis=1, keepdims=True)
        order = np.argsort(-(cut_q @ cut_p.T), axis=1)[:, :4]
        np.testing.assert_array_equal(ranking.positions_Qk, order)
        np.testing.assert_allclose(ranking.scores_Qk, np.take_along_axis(cut_q @ cut_p.T, order, 1), atol=1e-6)


def test_each_dim_is_ranked_in_each_precision_from_one_encoding(
    small_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, passages = (np.tile(vectors(rows), 2) / np.float32(np.sqrt(2)) for rows in (2, 30))
    np.save(tmp_path / "shard-00000.npy", passages)
    encoder: TextEncoder = Vectors(queries)
    monkeypatch.setattr(TrainedSystem, "load", lambda self, settings: encoder)
    settings = small_settings(
        "encoder.dims=[8,16]", "evaluate.precisions=[float32,binary,int8]", "evaluate.rescore_multiplier=3"
    )
    ranked = list(rankings("drama", settings, lambda system: tmp_path, ["a", "b"], 4))
    shards, precisions = EmbeddingShards(tmp_path), settings.evaluate.precisions
    assert [(ranking.dim, ranking.precision) for ranking in ranked] == [(d, p) for d in (16, 8) for p in precisions]
    for ranking in ranked:
        cut = matryoshka_cut_array(queries, ranking.dim)
        scores, positions = search_in(ranking.precision, shards, cut, 4, 3)
        np.testing.assert_array_equal(ranking.scores_Qk, scores)
        np.testing.assert_array_equal(ranking.positions_Qk, positions)
    (plain, _) = SYSTEMS["drama"].rank(settings, tmp_path, ["a", "b"], 4)
    assert plain.precision == "float32"


def test_bm25_has_no_dim_and_finds_words(small_settings: Callable[..., Settings]) -> None:
    settings = small_settings()
    folder = make(settings, "encode", system="bm25")
    (ranking,) = SYSTEMS["bm25"].rank(settings, folder, ["river delta", "zzz"], 5)
    assert ranking.dim is None and (ranking.positions_Qk[0] >= 0).all() and (ranking.positions_Qk[1] == -1).all()


def test_two_models_of_one_name_are_two_systems_and_an_unknown_one_is_refused(
    small_settings: Callable[..., Settings],
) -> None:
    settings = small_settings("evaluate.systems=[drama,model:a/export,model:b/export,model:x/teacher,model:.]")
    labels = list(settings.evaluate.labels)
    assert labels[:2] == ["drama", "export"] and len(set(labels)) == 5 and "teacher" not in labels
    assert labels[2].startswith("export-") and labels[4] == Path.cwd().name
    system = system_called(labels[2], settings)
    assert isinstance(system, OtherModel) and system.models(settings) == ["b/export"]
    with pytest.raises(SettingsError, match=r"system 'tacher': expected drama, asymmetric, ridge, .* or a model of"):
        system_called("tacher", settings)


@pytest.mark.parametrize("order", ["model:/x/drama+bm25,drama+bm25", "drama+bm25,model:/x/drama+bm25"])
def test_a_model_that_is_called_like_a_mix_is_none(order: str, small_settings: Callable[..., Settings]) -> None:
    labels = small_settings(f"evaluate.systems=[{order}]").evaluate.labels
    assert labels["drama+bm25"] == "drama+bm25" and len(labels) == 2


def test_every_system_that_the_settings_know_is_in_the_table() -> None:
    assert tuple(SYSTEMS) == settings_module.SYSTEMS


def test_vectors_do_not_depend_on_what_does_not_make_them(small_settings: Callable[..., Settings]) -> None:
    before, after = small_settings(), small_settings("encode.index=HNSW8", "teacher.rrf_k=7", "teacher.fuse_bm25=false")
    for name in ("drama", "teacher"):
        assert SYSTEMS[name].sections(before) == SYSTEMS[name].sections(after)
        assert SYSTEMS[name].sections(before) != SYSTEMS[name].sections(small_settings("encode.shard_passages=5"))


def test_a_mix_ranks_by_the_scores_of_both_and_encodes_nothing(small_settings: Callable[..., Settings]) -> None:
    settings = small_settings(
        "evaluate.systems=[llm-unpruned+bm25,drama]", "evaluate.mix_weight=0.3", "evaluate.precisions=[int8,binary]"
    )
    assert list(settings.evaluate.encoded_labels) == ["llm-unpruned", "bm25", "drama"]
    run = Run(settings)
    names = ["encode/corpus/llm-unpruned", "encode/corpus/bm25"]
    run.make(*names)
    texts = ["the river delta", "knead the dough"]

    def encoded(system: str) -> Path:
        return run.path(f"encode/corpus/{system}")

    (mix,) = rankings("llm-unpruned+bm25", settings, encoded, texts, 7)
    (dense,) = SYSTEMS["llm-unpruned"].rank(settings, encoded("llm-unpruned"), texts, 64)
    (lexical,) = rankings("bm25", settings, encoded, texts, 64)
    assert mix.precision == "float32" and mix.dim == dense.dim == 48 and mix.positions_Qk.shape == (2, 7)
    for row in range(2):
        total = np.zeros(64)
        for ranking, weight in ((dense, 0.3), (lexical, 0.7)):
            scores = ranking.scores_Qk[row].astype(float)
            shares = weight * (scores - scores.min()) / np.ptp(scores)
            there = ranking.positions_Qk[row] >= 0
            total[ranking.positions_Qk[row][there]] += shares[there]
        assert mix.positions_Qk[row].tolist() == np.argsort(-total.round(12), kind="stable")[:7].tolist()
    with pytest.raises(
        SettingsError, match=r"--system llm-unpruned\+bm25: a mix has no encoding; name llm-unpruned or"
    ):
        make(settings, "encode", system="llm-unpruned+bm25")
    with pytest.raises(SettingsError, match="no-such"):
        make(small_settings("evaluate.systems=[drama+no-such]"), "evaluate")


@pytest.mark.parametrize("name", ["drama+drama", "drama+", "+bm25", "drama+bm25+teacher", "drama+model:x"])
def test_what_cannot_be_mixed_is_refused(name: str, small_settings: Callable[..., Settings]) -> None:
    with pytest.raises(SettingsError, match=r"must be .* two of these as drama\+bm25"):
        small_settings(f"evaluate.systems=[{name}]")
