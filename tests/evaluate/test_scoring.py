"""Scoring rankings: measures, values of each query, run files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from drama_dist.corpus.collection import Collection, PassageTable
from drama_dist.evaluate.scoring import first_of_run, score, write_run
from drama_dist.records import Hit, Passage, Query
from drama_dist.search.systems import Ranking

TEXTS = ["alpha beta gamma", "beta delta", "gamma epsilon zeta", "alpha alpha", "eta theta"]


@pytest.fixture
def corpus(tmp_path: Path) -> Collection:
    PassageTable.write(tmp_path / "p", [Passage(f"p{n}", text, "", "en") for n, text in enumerate(TEXTS)])
    queries = [Query("q0", "alpha", "en"), Query("q1", "theta", "en")]
    return Collection(PassageTable.open(tmp_path / "p"), queries, {"q0": {"p3": 1}, "q1": {"p4": 1, "p1": 1}})


def test_a_ranking_is_scored_and_kept_as_a_run(corpus: Collection, tmp_path: Path) -> None:
    positions = np.array([[0, 3, -1], [4, 0, 2]])
    scores = np.array([[0.9, 0.8, 0.0], [0.5, 0.4, 0.3]], dtype=np.float32)
    result = score("drama", Ranking(8, scores, positions), corpus, tmp_path)
    ndcg = {"q0": 1 / np.log2(3), "q1": 1 / (1 + 1 / np.log2(3))}
    assert result.as_row()["ndcg@10"] == pytest.approx(sum(ndcg.values()) / 2)
    assert result.as_row() == {"system": "drama", "dim": 8, **result.metrics}
    assert result.metrics["mrr@10"] == 0.75 and result.metrics["recall@100"] == 0.75
    assert json.loads((tmp_path / "drama-8.ndcg.json").read_text("utf-8")) == pytest.approx(ndcg)
    lines = (tmp_path / "drama-8.trec").read_text("utf-8").splitlines()
    assert [line.split()[2] for line in lines] == ["p0", "p3", "p4", "p0", "p2"]


def test_a_ranking_of_other_queries_is_refused(corpus: Collection, tmp_path: Path) -> None:
    ranking = Ranking(None, np.zeros((3, 1), dtype=np.float32), np.zeros((3, 1), dtype=np.int64))
    with pytest.raises(ValueError, match="bm25: rankings of 3 for 2 queries"):
        score("bm25", ranking, corpus, tmp_path)


def test_run_files_keep_the_order_of_equal_scores_and_encode_spaces(tmp_path: Path) -> None:
    write_run(tmp_path / "r.trec", {"q 1": [Hit("b", 0.5), Hit("a x", 0.5)]}, "tag")
    fields = [line.split(" ") for line in (tmp_path / "r.trec").read_text("utf-8").splitlines()]
    assert [(row[0], row[2], row[3]) for row in fields] == [("q%201", "b", "1"), ("q%201", "a%20x", "2")]
    assert float(fields[0][4]) > float(fields[1][4])


def test_the_first_hits_of_a_run_file_are_read_again(tmp_path: Path) -> None:
    hits = {"q 1": [Hit("b", 0.5), Hit("a", 0.4)], "q2": [Hit("a x", 0.1)], "q3": [], "q4": [Hit("a", 1.0)]}
    write_run(tmp_path / "r.trec", hits, "tag")
    assert first_of_run(tmp_path / "r.trec", ["q 1", "q2", "q3"]) == {"q 1": "b", "q2": "a%20x"}
    (tmp_path / "r.trec").write_text("q1 Q0 b 1 0.5 tag\nq2 Q0 b\n", "utf-8")
    with pytest.raises(ValueError, match=r"r\.trec:2: expected query, Q0, passage"):
        first_of_run(tmp_path / "r.trec", ["q1"])
