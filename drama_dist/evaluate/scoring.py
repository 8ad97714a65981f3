"""Scoring systems on a corpus: embeddings or BM25 in, rankings, run files and measures out.

Covers searching at every Matryoshka dim from one encoding, TREC run files and per-query values. Which
systems there are and how they encode is the pipeline's affair.
Shapes: N passages, Q test queries (in the order of `Corpus.queries`), K components, k hits.
"""

from __future__ import annotations

import json
from collections import Counter
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
from drama_dist.search.dense import DenseIndex
from drama_dist.search.lexical import LexicalIndex


@dataclass(frozen=True)
class SystemResult:
    """What one system reaches at one dim; dim is None for a system without vectors."""

    system: str
    dim: int | None
    metrics: dict[str, float]

    def as_row(self) -> dict[str, Any]:
        """The result as a row of report.json: system, dim and the measures."""
        return {"system": self.system, "dim": self.dim, **self.metrics}


def evaluate_system(
    system: str,
    dims: Sequence[int],
    queries_QK: np.ndarray | None,
    passages_NK: np.ndarray | None,
    corpus: Corpus,
    depth: int,
    folder: Path,
) -> list[SystemResult]:
    """Score one system: its embeddings at every dim, largest first, or BM25 where it has none (None).

    depth: hits per query. Writes for each result the run, LABEL.trec, and nDCG@10 of each query,
    LABEL.ndcg.json, into `folder` (see `label`). Raises ValueError where the embeddings do not fit the
    corpus, a dim is larger than K, or no query is judged.
    """
    if queries_QK is None or passages_NK is None:
        return [_score(system, None, corpus, *_search_words(corpus, depth), folder)]
    expected = (len(corpus.queries), len(corpus.passages))
    if (len(queries_QK), len(passages_NK)) != expected:
        raise ValueError(
            f"{system}: {len(queries_QK)} query and {len(passages_NK)} passage vectors "
            f"for {expected[0]} queries and {expected[1]} passages; encode again"
        )
    results = []
    for dim in sorted(dims, reverse=True):
        index = DenseIndex(matryoshka_cut_array(passages_NK, dim))
        found = index.search(matryoshka_cut_array(queries_QK, dim), depth)
        results.append(_score(system, dim, corpus, *found, folder))
    return results


def label(system: str, dim: int | None) -> str:
    """How files name a result: SYSTEM-DIM, or SYSTEM where it has no vectors."""
    return system if dim is None else f"{system}-{dim}"


def ndcg_path(folder: Path, name: str) -> Path:
    """Where `evaluate_system` writes nDCG@10 of each query: a JSON object, query id -> value."""
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


def _search_words(corpus: Corpus, depth: int) -> tuple[np.ndarray, np.ndarray]:
    everything = range(len(corpus.passages))
    languages = Counter(query.language for query in corpus.queries)
    index = LexicalIndex(corpus.passages.contents(everything), languages.most_common(1)[0][0])
    return index.search([query.text for query in corpus.queries], depth)


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
