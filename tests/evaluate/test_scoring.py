"""Scoring systems: every dim from one encoding, BM25, run files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from drama_dist.corpus.collection import Corpus, PassageTable
from drama_dist.evaluate.scoring import score_system, write_run
from drama_dist.records import Hit, Passage, Query
from drama_dist.search.lexical import build_lexical_index
from drama_dist.search.shards import EmbeddingShards, write_shard

TEXTS = ["alpha beta gamma", "beta delta", "gamma epsilon zeta", "alpha alpha", "eta theta"]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    PassageTable.write(tmp_path / "p", [Passage(f"p{n}", text, "", "en") for n, text in enumerate(TEXTS)])
    queries = [Query("q0", "alpha", "en"), Query("q1", "theta", "en")]
    return Corpus(PassageTable.open(tmp_path / "p"), queries, {"q0": {"p3": 1}, "q1": {"p4": 1, "p1": 1}})


def vectors(rows: int) -> np.ndarray:
    drawn = np.random.default_rng(rows).normal(size=(rows, 8)).astype(np.float32)
    return drawn / np.linalg.norm(drawn, axis=1, keepdims=True)


def shards(folder: Path, passages: np.ndarray) -> EmbeddingShards:
    for index, start in enumerate(range(0, len(passages), 2)):
        write_shard(folder, index, passages[start : start + 2])
    return EmbeddingShards(folder)


def test_each_dim_equals_a_ranking_by_the_cut_vectors(corpus: Corpus, tmp_path: Path) -> None:
    queries, passages = vectors(2), vectors(5)
    results = score_system("drama", [3, 8], queries, shards(tmp_path, passages), corpus, 4, tmp_path)
    assert [(result.system, result.dim) for result in results] == [("drama", 8), ("drama", 3)]
    for result in results:
        cut_q, cut_p = (rows[:, : result.dim] for rows in (queries, passages))
        cosine = (cut_q / np.linalg.norm(cut_q, axis=1, keepdims=True)) @ (
            cut_p / np.linalg.norm(cut_p, axis=1, keepdims=True)
        ).T
        order = np.argsort(-cosine, axis=1)[:, :4]
        lines = (tmp_path / f"drama-{result.dim}.trec").read_text("utf-8").splitlines()
        assert [line.split()[2] for line in lines] == [f"p{position}" for row in order for position in row]
        first = next(rank for rank, position in enumerate(order[0], 1) if position == 3)
        values = json.loads((tmp_path / f"drama-{result.dim}.ndcg.json").read_text("utf-8"))
        assert values["q0"] == pytest.approx(1 / np.log2(first + 1))
        assert result.metrics["ndcg@10"] == pytest.approx(sum(values.values()) / 2)


def test_bm25_has_no_dim(corpus: Corpus, tmp_path: Path) -> None:
    index = build_lexical_index(corpus.passages.texts(), "en", tmp_path)
    (result,) = score_system("bm25", [], None, index, corpus, 4, tmp_path)
    assert result.as_row().keys() == {"system", "dim", "ndcg@10", "recall@100", "mrr@10"}
    assert result.dim is None and result.metrics["mrr@10"] == 1.0 and result.metrics["recall@100"] == 0.75


def test_vectors_of_another_corpus_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="drama: encodes 4 passages, not the corpus' 5"):
        score_system("drama", [8], vectors(2), shards(tmp_path, vectors(4)), corpus, 4, tmp_path)
    for queries, count in ((vectors(3), 3), (None, 0)):
        with pytest.raises(ValueError, match=f"drama: {count} query vectors for 2 queries"):
            score_system("drama", [8], queries, shards(tmp_path, vectors(5)), corpus, 4, tmp_path)


def test_run_files_keep_the_order_of_equal_scores_and_encode_spaces(tmp_path: Path) -> None:
    write_run(tmp_path / "r.trec", {"q 1": [Hit("b", 0.5), Hit("a x", 0.5)]}, "tag")
    fields = [line.split(" ") for line in (tmp_path / "r.trec").read_text("utf-8").splitlines()]
    assert [(row[0], row[2], row[3]) for row in fields] == [("q%201", "b", "1"), ("q%201", "a%20x", "2")]
    assert float(fields[0][4]) > float(fields[1][4])
