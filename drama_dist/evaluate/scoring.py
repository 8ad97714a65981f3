"""Scoring a ranking: measures, TREC run files and values of each query.

Which systems there are and how they rank is in search/systems.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from drama_dist.corpus.collection import Collection
from drama_dist.evaluate.metrics import mean_over_queries, per_query
from drama_dist.records import Hit
from drama_dist.run.files import write_text
from drama_dist.search.systems import Ranking
from drama_dist.setting_types import Precision


@dataclass(frozen=True)
class SystemResult:
    """What one system reaches at one dim in one precision; dim is None for a system without vectors."""

    system: str
    dim: int | None
    metrics: dict[str, float]
    precision: Precision = "float32"

    def as_row(self) -> dict[str, Any]:
        """The result as a row of report.json: system, dim, precision where it is not float32, and the measures."""
        precision = {} if self.precision == "float32" else {"precision": self.precision}
        return {"system": self.system, "dim": self.dim, **precision, **self.metrics}


def without_own(ranking: Ranking, collection: Collection, depth: int) -> Ranking:
    """The first `depth` hits of each query but the passage that has its id, for queries that are passages."""
    own = [collection.passages.find(query.id) for query in collection.queries]
    own_Q1 = np.array([[-1 if position is None else position] for position in own])
    is_own_Qk = (ranking.positions_Qk == own_Q1) & (own_Q1 >= 0)
    order_Qk = np.argsort(is_own_Qk, axis=1, kind="stable")[:, :depth]
    positions_Qk = np.where(is_own_Qk, -1, ranking.positions_Qk)
    positions_Qk = np.take_along_axis(positions_Qk, order_Qk, 1)
    return replace(ranking, positions_Qk=positions_Qk, scores_Qk=np.take_along_axis(ranking.scores_Qk, order_Qk, 1))


def score(system: str, ranking: Ranking, collection: Collection, folder: Path) -> SystemResult:
    """Score one ranking of a collection for its queries, in their order.

    Writes the run, LABEL.trec, and nDCG@10 of each query, LABEL.ndcg.json, into `folder` (see `label`). Raises
    ValueError where no query is judged, or the ranking is of other queries.
    """
    if len(ranking.positions_Qk) != len(collection.queries):
        raise ValueError(f"{system}: rankings of {len(ranking.positions_Qk)} for {len(collection.queries)} queries")
    ids = collection.passages.ids
    hits = zip(collection.queries, ranking.positions_Qk, ranking.scores_Qk, strict=True)
    run = {
        query.id: [Hit(ids[int(p)], float(s)) for p, s in zip(positions, scores, strict=True) if p >= 0]
        for query, positions, scores in hits
    }
    values, name = per_query(collection.qrels, run), label(system, ranking.dim, ranking.precision)
    write_run(folder / f"{name}.trec", run, name)
    ndcg = {query: value["ndcg@10"] for query, value in values.items()}
    write_text(ndcg_path(folder, name), json.dumps(ndcg) + "\n")
    return SystemResult(system, ranking.dim, mean_over_queries(values), ranking.precision)


def label(system: str, dim: int | None, precision: str = "float32") -> str:
    """How files name a result: SYSTEM-DIM, SYSTEM-DIM-PRECISION, or SYSTEM where it has no vectors."""
    if dim is None:
        return system
    return f"{system}-{dim}" if precision == "float32" else f"{system}-{dim}-{precision}"


def label_of(row: Mapping[str, Any]) -> str:
    """The label of a row of results.json."""
    return label(row["system"], row["dim"], precision_of(row))


def precision_of(row: Mapping[str, Any]) -> str:
    """The precision of a row of results.json, which says nothing of float32."""
    return str(row.get("precision", "float32"))


def ndcg_path(folder: Path, name: str) -> Path:
    """Where `score` writes nDCG@10 of each query: a JSON object, query id -> value."""
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


def first_of_run(path: Path, queries: Iterable[str]) -> dict[str, str]:
    """Query -> the passage of rank 1 in what `write_run` wrote; queries without a hit are left out.

    The passage is as the file has it: white space in its id is percent-encoded. Raises ValueError for another file.
    """
    asked = {_field(query): query for query in queries}
    first = {}
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                query, _, passage, rank, _, _ = line.split()
            except ValueError:
                raise ValueError(f"{path}:{number}: expected query, Q0, passage, rank, score and tag") from None
            if rank == "1" and query in asked:
                first[asked[query]] = passage
    return first


def _field(text: str) -> str:
    return "".join(quote(character) if character.isspace() else character for character in text)
