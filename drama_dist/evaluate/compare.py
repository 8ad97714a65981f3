"""Comparing the results of two finished runs: a paired test, and which queries one wins and loses, with their texts.

Reads evaluate/COLLECTION and the stored collections of both, and no settings: the runs may have been made with any. A
and B are the results; A wins a query where its nDCG@10 is higher. Scoring is in scoring.py, the test in metrics.py.
Shapes: Q queries that both have.
"""

from __future__ import annotations

import csv
import io
import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np

from drama_dist.corpus.collection import Collection, open_collection
from drama_dist.evaluate.metrics import evenly_weighted, paired_p_value
from drama_dist.evaluate.scoring import first_of_run, label, ndcg_path, precision_of
from drama_dist.evaluate.tables import shown_p, table
from drama_dist.records import Query
from drama_dist.run.artefact import PROVENANCE, verify
from drama_dist.run.files import write_text
from drama_dist.run.graph import CORPUS, is_finished, stored_collection

_SEED = 1  # of the randomisation test
_NAMED = 5  # ids of queries in a note
_NARROWEST = 40  # characters in a line, however narrow the terminal is
_QUERY = 240  # characters of a query that are shown
_MARGIN = "    "
_HEADINGS = ["collection", "queries", "A", "B", "A - B", "p", "wins", "losses", "ties"]
_Rows = list[dict[str, Any]]  # of results.json


@dataclass(frozen=True)
class Result:
    """One system at one dim in one precision on a collection of a run. values: query id -> nDCG@10, of all queries."""

    run: Path
    label: str
    collection: str
    stored: Collection
    values: dict[str, float]

    def first_passages(self, queries: Sequence[Query]) -> dict[str, str]:
        """Query id -> id, judgement and text of the passage that ranks first; nothing for a query without hits."""
        path = self.run / "evaluate" / self.collection / f"{self.label}.trec"
        first = first_of_run(path, [query.id for query in queries])
        return {query: self._described(query, passage) for query, passage in first.items()}

    def _described(self, query: str, passage: str) -> str:
        table, judged = self.stored.passages, self.stored.qrels[query]
        found = table[table.position(_without_field(passage) if table.find(passage) is None else passage)]
        judgement = "not judged" if found.id not in judged else "relevant" if judged[found.id] > 0 else "not relevant"
        return f"{found.id} ({judgement}): {found.title or found.text}"


@dataclass(frozen=True)
class Comparison:
    """Two results on a collection. queries: those that both have, Q. a_Q, b_Q: nDCG@10 of A and B, float64.

    notes: in what else the two differ.
    """

    a: Result
    b: Result
    queries: list[Query]
    a_Q: np.ndarray
    b_Q: np.ndarray
    notes: list[str]

    @property
    def difference_Q(self) -> np.ndarray:
        """A - B, float64."""
        difference: np.ndarray = self.a_Q - self.b_Q
        return difference

    @property
    def counts(self) -> tuple[int, int, int]:
        """Wins of A, losses of A, ties."""
        wins, losses = int((self.difference_Q > 0).sum()), int((self.difference_Q < 0).sum())
        return wins, losses, len(self.queries) - wins - losses


def compare(
    run_a: Path,
    run_b: Path,
    collection: str | None = None,
    systems: tuple[str, str] = ("drama", "drama"),
    dim: int | None = None,
    precisions: tuple[str, str] = ("float32", "float32"),
) -> list[Comparison]:
    """Compare a system of one run with a system of another, or of the same, on each collection that both have judged.

    collection: only this one. systems: of A and B, as tables of results call them. dim: of both, as far as they have
    vectors; None: the largest that both have, or else the largest of each. precisions: of A's and of B's vectors.
    Raises FileNotFoundError where a run is not there or not evaluated, Damaged where what it has is not what was
    written, and ValueError where it has no such collection, system, precision or dim, or the judgements differ.
    """
    rows_a, rows_b = _judged(run_a), _judged(run_b)
    for run, rows in ((run_a, rows_a), (run_b, rows_b)):
        if collection is not None and collection not in rows:
            raise ValueError(f"collection {collection!r}: {run} has results on {', '.join(rows)}")
    common = [name for name in rows_a if name in rows_b and collection in (None, name)]
    if not common:
        on = f"{run_a} on {', '.join(rows_a)}, {run_b} on {', '.join(rows_b)}"
        raise ValueError(f"the runs have results on no common collection: {on}")
    comparisons: list[Comparison] = []
    left_out: list[str] = []
    for name in common:
        dims_a = _dims(run_a, name, systems[0], precisions[0], rows_a[name], dim)
        dims_b = _dims(run_b, name, systems[1], precisions[1], rows_b[name], dim)
        shared = dims_a & dims_b
        a = _result(run_a, name, label(systems[0], _largest(shared or dims_a), precisions[0]))
        b = _result(run_b, name, label(systems[1], _largest(shared or dims_b), precisions[1]))
        try:
            comparisons.append(_paired(a, b))
        except ValueError as error:  # as of the corpus, where two runs of different ones share a suite
            if len(common) == 1:
                raise
            left_out.append(f"left out: {error}")
    if not comparisons:
        raise ValueError("; ".join(left_out))
    comparisons[-1].notes.extend(left_out)
    return comparisons


def p_value(comparisons: Sequence[Comparison]) -> float:
    """p of the paired test over the queries of all collections, each collection weighing the same."""
    a = evenly_weighted([one.a_Q.tolist() for one in comparisons])
    b = evenly_weighted([one.b_Q.tolist() for one in comparisons])
    return paired_p_value(a, b, _SEED)


def as_text(comparisons: Sequence[Comparison], count: int, width: int) -> str:
    """The table, and the `count` largest wins and losses on each collection. width: of the terminal, in characters."""
    lines = list(dict.fromkeys(f"A: {one.a.run}, {one.a.label}" for one in comparisons))
    lines += dict.fromkeys(f"B: {one.b.run}, {one.b.label}" for one in comparisons)
    lines += ["", _table(comparisons), "", "nDCG@10; wins and losses of A; p of a two-sided paired randomisation test"]
    lines += [note for one in comparisons for note in one.notes]
    return "\n".join([*lines, *(line for one in comparisons for line in _examples(one, count, width))])


def write_queries(comparisons: Sequence[Comparison], path: Path) -> None:
    """Write every query with its text, both values and their difference, as .tsv with a header or as .json, a list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"collection": one.a.collection, "id": query.id, "text": query.text, "a": a, "b": b, "difference": a - b}
        for one in comparisons
        for query, a, b in zip(one.queries, one.a_Q.tolist(), one.b_Q.tolist(), strict=True)
    ]
    if path.suffix == ".json":
        write_text(path, json.dumps(rows, indent=2, ensure_ascii=False) + "\n")
        return
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0].keys(), delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "text": _one_line(row["text"])} for row in rows)
    write_text(path, table.getvalue())


def _judged(run: Path) -> dict[str, _Rows]:
    """Collection -> rows of results.json, of every collection with judged queries; the corpus first."""
    if not run.is_dir():
        raise FileNotFoundError(f"{run}: no such run")
    folders = [path.parent for path in run.glob(f"evaluate/*/{PROVENANCE}") if path.parent.suffix != ".partial"]
    names = sorted((folder.name for folder in folders), key=lambda name: (name != CORPUS, name))
    if not names:
        raise FileNotFoundError(f"{run}: not evaluated; do it first: drama evaluate SETTINGS run={run}")
    judged = {}
    for name in names:
        verify(run, f"evaluate/{name}")
        if rows := json.loads((run / "evaluate" / name / "results.json").read_text("utf-8")):
            judged[name] = rows
    if not judged:
        raise ValueError(f"{run}: no results, because {', '.join(names)} has no judged queries")
    return judged


def _dims(run: Path, collection: str, system: str, precision: str, rows: _Rows, dim: int | None) -> set[int | None]:
    """The dims of a system's results, {None} for one without vectors; only `dim` where it is given."""
    own = [row for row in rows if row["system"] == system]
    if not own:
        systems = ", ".join(dict.fromkeys(row["system"] for row in rows))
        raise ValueError(f"system {system!r}: {run} has on {collection}: {systems}")
    dims = {row["dim"] for row in own if row["dim"] is None or precision_of(row) == precision}
    if not dims:
        has = ", ".join(dict.fromkeys(map(precision_of, own)))
        raise ValueError(f"precision {precision}: {run} has {system} on {collection} in {has}")
    if dim is None or dims == {None}:
        return dims
    if dim not in dims:
        has = ", ".join(map(str, sorted(dims, reverse=True)))
        raise ValueError(f"dim {dim}: {run} has {system} on {collection} at dim {has}")
    return {dim}


def _largest(dims: set[int | None]) -> int | None:
    return max(dims, key=lambda dim: dim or 0)


def _result(run: Path, collection: str, name: str) -> Result:
    stored = stored_collection(collection)
    if not is_finished(run, stored):
        raise FileNotFoundError(f"{run / stored}: not found; make it first: drama corpus SETTINGS run={run}")
    verify(run, stored)
    path = ndcg_path(run / "evaluate" / collection, name)
    result = Result(run, name, collection, open_collection(run / stored), json.loads(path.read_text("utf-8")))
    if not result.values.keys() == result.stored.qrels.keys() == {query.id for query in result.stored.queries}:
        raise ValueError(f"{path}: of other queries than {run / stored} has; run drama evaluate again")
    return result


def _paired(a: Result, b: Result) -> Comparison:
    where = f"{a.collection} of {a.run} and of {b.run}"
    theirs = {query.id: query for query in b.stored.queries}
    queries = [query for query in a.stored.queries if query.id in theirs]
    if not queries:
        raise ValueError(f"{where}: no query in common")
    if all(query.text != theirs[query.id].text for query in queries):
        raise ValueError(f"{where}: not the same collection, all common queries have other texts: {_ids([*theirs])}")
    differ = [query.id for query in queries if _relevant(a, query) != _relevant(b, query)]
    if differ:
        count = f"{len(differ)} of {len(queries)} common queries"
        raise ValueError(f"{where}: not the same collection, the judgements of {count} differ: {_ids(differ)}")
    kinds = {
        "only in A": [query.id for query in a.stored.queries if query.id not in theirs],
        "only in B": [id for id in theirs if id not in a.values],
        "with another text in B": [query.id for query in queries if query.text != theirs[query.id].text],
    }
    notes = [f"{a.collection}: queries {kind}: {len(ids)} ({_ids(ids)})" for kind, ids in kinds.items() if ids]
    sizes = [len(side.stored.passages) for side in (a, b)]
    if sizes[0] != sizes[1]:
        notes.append(f"{a.collection}: passages: {sizes[0]} in A, {sizes[1]} in B")
    a_Q, b_Q = (np.array([side.values[query.id] for query in queries]) for side in (a, b))
    return Comparison(a, b, queries, a_Q, b_Q, notes)


def _relevant(side: Result, query: Query) -> dict[str, int]:
    """The judgements that nDCG depends on."""
    return {passage: grade for passage, grade in side.stored.qrels[query.id].items() if grade > 0}


def _ids(ids: Sequence[str]) -> str:
    return ", ".join(ids[:_NAMED]) + (", ..." if len(ids) > _NAMED else "")


def _table(comparisons: Sequence[Comparison]) -> str:
    means = [(float(one.a_Q.mean()), float(one.b_Q.mean())) for one in comparisons]
    rows = [
        [one.a.collection, str(len(one.queries)), *_shown(a, b, p_value([one])), *map(str, one.counts)]
        for one, (a, b) in zip(comparisons, means, strict=True)
    ]
    if len(comparisons) > 1:
        a, b = (float(np.mean(side)) for side in zip(*means, strict=True))
        rows.append(["average", "", *_shown(a, b, p_value(comparisons)), "", "", ""])
    return table([_HEADINGS, *rows])


def _shown(a: float, b: float, p: float) -> list[str]:
    return [f"{a:.4f}", f"{b:.4f}", f"{a - b:+.4f}", shown_p(p)]


def _examples(one: Comparison, count: int, width: int) -> list[str]:
    """The largest wins and losses, each with its values, text, and the first passages of A and B."""
    wide = max(width, _NARROWEST)
    wins, losses, _ = one.counts
    shown = {
        "wins": np.argsort(-one.difference_Q, kind="stable")[: min(count, wins)].tolist(),
        "losses": np.argsort(one.difference_Q, kind="stable")[: min(count, losses)].tolist(),
    }
    queries = [one.queries[position] for positions in shown.values() for position in positions]
    first = {name: side.first_passages(queries) for name, side in (("A", one.a), ("B", one.b))}
    lines = []
    for kind, positions in shown.items():
        lines += ["", f"{one.a.collection}: largest {kind}"] if positions else []
        for position in positions:
            query, values = one.queries[position], f"A {one.a_Q[position]:.3f}, B {one.b_Q[position]:.3f}"
            lines.append(f"{one.difference_Q[position]:+.3f} ({values})  query {query.id}")
            lines += textwrap.wrap(_cut(query.text, _QUERY), wide, initial_indent=_MARGIN, subsequent_indent=_MARGIN)
            for name, passages in first.items():
                lines.append(_MARGIN + _cut(f"{name} first: {passages.get(query.id, 'nothing')}", wide - len(_MARGIN)))
    return lines


def _cut(text: str, room: int) -> str:
    # not at spaces: Chinese has none
    text = _one_line(text)
    return text if len(text) <= room else f"{text[: room - 4].rstrip()} ..."


def _without_field(id: str) -> str:
    """An id as it was before scoring.py encoded its white space."""

    def decoded(found: re.Match[str]) -> str:
        text = unquote(found[0])
        return text if text.isspace() else found[0]

    return re.sub(r"(?:%[0-9A-F]{2})+", decoded, id)


def _one_line(text: str) -> str:
    return " ".join(text.split())
