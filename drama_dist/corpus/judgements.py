"""Judgements in the forms that people have them in: BEIR's and TREC's columns, and whatever formats.py reads.

Does not cover whether the queries and passages exist (read.py), nor the file that a collection keeps (collection.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from drama_dist.corpus.collection import HIGHEST_GRADE
from drama_dist.corpus.formats import Columns, Row, form_of, open_data, read_rows, shown_names, text_lines, unquoted
from drama_dist.corpus.parts import Unfit, id_of, part
from drama_dist.records import BadRecord, invalid_utf8

Judgement = tuple[str, str, int]  # query id, passage id, grade

_QUERY_IDS = ("query-id", "query_id", "queryid", "qid", "topic_id", "topic", "query")
_PASSAGE_IDS = ("corpus-id", "corpus_id", "passage-id", "passage_id", "document_id", "pid", "docid", "doc_id", "docno")
_GRADES = ("score", "relevance", "rel", "grade", "label")
_NAMES = (_QUERY_IDS, _PASSAGE_IDS, _GRADES)
_REMEDY = "expected one of each: " + "; ".join(", ".join(names) for names in _NAMES)
_COLUMNS = Columns(frozenset(name for names in _NAMES for name in names), None, _REMEDY)
_BEIR = (_QUERY_IDS[0], _PASSAGE_IDS[0], _GRADES[0])
_TREC = (_QUERY_IDS[0], "iteration", _PASSAGE_IDS[0], _GRADES[0])
_GRADE = re.compile(r"[+-]?[0-9]{1,9}(\.0*)?")


def read_judgements(path: Path) -> Iterator[tuple[int, Judgement | BadRecord]]:
    """Yield (line number, (query id, passage id, grade)), or a BadRecord for a judgement that cannot be read.

    Lines have the columns that a header names; without a header BEIR's three, or TREC's four (query, iteration,
    passage, grade). Between columns are tabs, or blanks where there are no tabs. Raises ValueError naming the file
    where it is damaged, or its header lacks a column.
    """
    rows = _line_rows(path) if form_of(path) in ("tsv", "text") else read_rows(path, _COLUMNS)
    for line, row in rows:
        yield line, row if isinstance(row, BadRecord) else _judgement(path, line, row)


def _line_rows(path: Path) -> Iterator[Row]:
    with open_data(path) as file:
        lines = text_lines(file)
    header: Sequence[str] | None = None
    is_first = True
    for line, text in enumerate(lines, 1):
        if not text.strip():
            continue
        if is_first:
            is_first, header = False, _header(path, line, text)
            if header:
                continue
        yield line, invalid_utf8(path, line, text) or _row(path, line, text.rstrip(), header)


def _row(path: Path, line: int, text: str, header: Sequence[str] | None) -> dict[str, Any] | BadRecord:
    allowed = [header] if header else [_BEIR, _TREC]
    for cells in (text.split("\t"), text.split()):
        for names in allowed:
            if len(names) == len(cells):
                return dict(zip(names, map(unquoted, cells) if header else cells, strict=True))
    expected = (
        f"the {len(header)} columns of the header" if header else "query, passage and grade, or TREC's four columns"
    )
    return BadRecord(path, line, f"expected {expected}", text)


def _header(path: Path, line: int, text: str) -> list[str] | None:
    """The names in the first line; None if it is a judgement."""
    found = [unquoted(cell.strip()) for cell in (text.split("\t") if "\t" in text else text.split())]
    names = _COLUMNS.of_table(path, found)
    kinds = [not set(names).isdisjoint(kind) for kind in _NAMES]
    if sum(kinds) < 2 and names[-1] not in _GRADES:
        return None
    if not all(kinds):
        raise ValueError(f"{path}:{line}: the header has {shown_names(found)}: {_REMEDY}")
    return names


def _judgement(path: Path, line: int, value: Mapping[str, Any]) -> Judgement | BadRecord:
    try:
        query, passage = part(value, _QUERY_IDS, id_of, "query id"), part(value, _PASSAGE_IDS, id_of, "passage id")
    except Unfit as problem:
        return BadRecord(path, line, str(problem), value)
    if not query or not passage:
        return BadRecord(path, line, "no query id or no passage id", value, f"(it has {shown_names(value)})")
    grade = _grade(next((value[name] for name in _GRADES if value.get(name) is not None), None))
    if grade is None:
        return BadRecord(path, line, f"expected a whole number up to {HIGHEST_GRADE} as grade", value)
    return query, passage, grade


def _grade(value: object) -> int | None:
    """A grade as it is written in files (1, "1", "1.0", 1.0); None if it is no whole number, or a senseless one."""
    if isinstance(value, str) and _GRADE.fullmatch(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= HIGHEST_GRADE:
        return None
    return int(value) if value == int(value) else None
