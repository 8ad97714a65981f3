"""A small collection in BEIR's form, whose ids begin with 0: numbers that they were taken for would be others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conftest import passages, write_lines


def judgements(path: Path, *rows: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]) + "\n", "utf-8")


def write_beir(folder: Path, count: int = 60) -> list[dict[str, str]]:
    """Passages with numbers that begin with 0 as ids, and a query of each fourth one; returns the queries."""
    rows = [{**row, "_id": f"{number:03d}"} for number, row in enumerate(passages(count))]
    queries = [{"_id": row["_id"], "text": " ".join(row["text"].split()[4:9])} for row in rows[::4]]
    write_lines(folder / "corpus.jsonl", rows)
    write_lines(folder / "queries.jsonl", queries)
    return queries


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]
