"""Data sets of the library ir_datasets as collections; needs the extra ir-datasets.

Covers passages, queries and judgements. Does not cover writing them (beir_folder.py), nor how ir_datasets fetches
what they are made from, or where it keeps that ($IR_DATASETS_HOME, or ~/.ir_datasets).
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterator
from typing import Any

from drama_dist.corpus.beir_folder import NoSuchCollection, Table, Tables
from drama_dist.corpus.parts import as_unicode
from drama_dist.labels import IR_DATASETS

PAGE = "https://ir-datasets.com"


def tables_of(collection: str) -> Tables:
    """The tables of ir_datasets:ID; reads and fetches none.

    Raises NoSuchCollection where the library knows no such passages, and ModuleNotFoundError, saying what to install,
    where it is missing.
    """
    if importlib.util.find_spec("ir_datasets") is None:
        raise ModuleNotFoundError("the package ir_datasets is not installed: pip install 'drama-dist[ir-datasets]'")
    import ir_datasets

    name = collection.removeprefix(IR_DATASETS)
    try:
        data = ir_datasets.load(name)
    except KeyError:
        close = difflib.get_close_matches(name, list(ir_datasets.registry), n=3)
        meant = f"; did you mean {' or '.join(close)}?" if close else ""
        raise NoSuchCollection(f"ir_datasets has no data set {name}{meant} ({PAGE} lists them)") from None
    if not data.has_docs():
        raise NoSuchCollection(f"{name} of ir_datasets has no passages; name one that has ({PAGE} lists them)")
    judged = data.has_queries() and data.has_qrels()
    return Tables(
        Table(_passages(data), _count(data, "docs")),
        Table(_queries(data), _count(data, "queries")) if judged else None,
        Table(_judgements(data), _count(data, "qrels")) if judged else None,
        f"{name} of ir_datasets ({PAGE})",
    )


def _passages(data: Any) -> Iterator[dict[str, Any]]:
    language = _language(data.docs_lang())
    for document in data.docs_iter():
        # Each type says which of its fields are text; where the title is one, it comes first.
        title, whole = getattr(document, "title", None) or "", as_unicode(document.default_text())
        title = as_unicode(title) if isinstance(title, str) else ""
        if not whole.startswith(title):
            title = ""
        yield {"_id": document.doc_id, "title": title, "text": whole[len(title) :].strip(), **language}


def _queries(data: Any) -> Iterator[dict[str, Any]]:
    language = _language(data.queries_lang())
    for query in data.queries_iter():
        yield {"_id": query.query_id, "text": as_unicode(query.default_text()), **language}


def _judgements(data: Any) -> Iterator[dict[str, Any]]:
    for judgement in data.qrels_iter():
        yield {"query-id": judgement.query_id, "corpus-id": judgement.doc_id, "score": judgement.relevance}


def _language(code: str | None) -> dict[str, str]:
    """Nothing where it is not known, or there are several: corpus.language then counts."""
    return {"language": code} if code else {}


def _count(data: Any, kind: str) -> int | None:
    count = data.metadata().get(kind, {}).get("count")
    return count if isinstance(count, int) else None
