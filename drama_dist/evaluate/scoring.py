"""Scoring systems on a corpus: embedding shards or a BM25 index in, rankings, run files and measures out.

Covers exact search at every Matryoshka dim from one encoding, TREC run files and per-query values. Which
systems there are and how they encode is the pipeline's affair.
Shapes: N passages, Q test queries (in the order of `Corpus.queries`), K components, k hits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from drama_dist.corpus.collection import Corpus
from drama_dist.encoder.pooling import matryoshka_cut_array
from drama_dist.evaluate.metrics import mean_over_queries, per_query
from drama_dist.records import Hit
from drama_dist.run.folder import write_text
from drama_dist.search.dense import search_exact
from drama_dist.search.lexical import LexicalIndex
from drama_dist.search.shards import EmbeddingShards


@dataclass(frozen=True)
class SystemResult:
    """What one system reaches at one dim; dim is None for a system without vectors."""

    system: str
    dim: int | None
    metrics: dict[str, float]

    def as_row(self) -> dict[str, Any]:
        """The result as a row of report.json: system, dim and the measures."""
        return {"system": self.system, "dim": self.dim, **self.metrics}


def score_system(
    system: str,
    dims: Sequence[int],
    queries_QK: np.ndarray | None,
    passages: EmbeddingShards | LexicalIndex,
    corpus: Corpus,
    depth: int,
    folder: Path,
) -> list[SystemResult]:
    """Score one system: its embeddings at every dim, largest first, or BM25, which has neither dims nor query vectors.

    depth: hits per query. Writes for each result the run, LABEL.trec, and nDCG@10 of each query,
    LABEL.ndcg.json, into `folder` (see `label`). Raises ValueError where embeddings or index do not fit the
    corpus, a dim is larger than K, or no query is judged.
    """
    queries = corpus.queries
    if len(passages) != len(corpus.passages):
        raise ValueError(
            f"{system}: encodes {len(passages)} passages, not the corpus' {len(corpus.passages)}; encode again"
        )
    if isinstance(passages, LexicalIndex):
        hits = passages.search([query.text for query in queries], depth)
        return [_score(system, None, corpus, *hits, folder)]
    if queries_QK is None or len(queries_QK) != len(queries):
        vectors = 0 if queries_QK is None else len(queries_QK)
        raise ValueError(f"{system}: {vectors} query vectors for {len(queries)} queries; encode again")
    results = []
    for dim in sorted(dims, reverse=True):
        hits = search_exact(passages, matryoshka_cut_array(queries_QK, dim), depth, dim)
        results.append(_score(system, dim, corpus, *hits, folder))
    return results


def label(system: str, dim: int | None) -> str:
    """How files name a result: SYSTEM-DIM, or SYSTEM where it has no vectors."""
    return system if dim is None else f"{system}-{dim}"


def ndcg_path(folder: Path, name: str) -> Path:
    """Where `score_system` writes nDCG@10 of each query: a JSON object, query id -> value."""
    return folder / f"{name}.ndcg.json"


def write_run(path: Path, run: Mapping[str, Sequence[Hit]], tag: str) -> None:
    """Write a TREC run file: query, Q0, passage, rank, score, tag.

    White space in ids is percent-encoded. trec_eval orders by score and not by rank, so an equal
    score is written one float32 step below the one before it.
    """
    lines = []
    for query, hits in run.items():
        above = np.float32(np.inf)
        for rank, hit in enumerate(hits, 1):
            above = min(np.float32(hit.score), np.nextafter(above, np.float32(-np.inf)))
            lines.append(f"{_field(query)} Q0 {_field(hit.passage_id)} {rank} {above!s} {_field(tag)}\n")
    write_text(path, "".join(lines))


def _score(
    system: str, dim: int | None, corpus: Corpus, scores_Qk: np.ndarray, positions_Qk: np.ndarray, folder: Path
) -> SystemResult:
    ids = corpus.passages.ids
    run = {
        query.id: [Hit(ids[int(p)], float(s)) for p, s in zip(positions, scores, strict=True) if p >= 0]
        for query, positions, scores in zip(corpus.queries, positions_Qk, scores_Qk, strict=True)
    }
    values, name = per_query(corpus.qrels, run), label(system, dim)
    write_run(folder / f"{name}.trec", run, name)
    ndcg = {query: value["ndcg@10"] for query, value in values.items()}
    write_text(ndcg_path(folder, name), json.dumps(ndcg) + "\n")
    return SystemResult(system, dim, mean_over_queries(values))


def _field(text: str) -> str:
    return "".join(quote(character) if character.isspace() else character for character in text)
