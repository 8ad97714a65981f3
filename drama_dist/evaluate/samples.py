"""Samples of the training examples for the report: a few of each source, and how often the source passage came back.

Reads RUN/augment and the texts of RUN/windows. What the sources are is in augment/.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from drama_dist.corpus.collection import PassageTable, open_collection
from drama_dist.records import Example, read_records
from drama_dist.run.graph import TRAINING_TEXTS, is_finished

_EACH = 5
_SHOWN = 240  # characters of a text
_TOLD = ("kind", "model", "ranked_by", "task")  # of an example's provenance


def samples_by_source(run: Path, seed: int) -> list[dict[str, Any]]:
    """For each source: its examples' number, the shares whose source passage ranks first and among the first 10, and
    samples; nothing where a run has no examples. The shares are None where no example has a source passage.
    """
    if not (is_finished(run, "augment") and is_finished(run, TRAINING_TEXTS)):
        return []
    examples = read_records(run / "augment" / "examples.jsonl", Example.from_json)
    table = open_collection(run / TRAINING_TEXTS).passages
    by_source: dict[str, list[Example]] = {}
    for example in examples:
        by_source.setdefault(example.source, []).append(example)
    return [_of_source(source, rows, table, seed) for source, rows in sorted(by_source.items())]


def _of_source(source: str, rows: list[Example], table: PassageTable, seed: int) -> dict[str, Any]:
    ranks = [row.provenance["rank"] for row in rows if "rank" in row.provenance]
    drawn = random.Random(f"{seed} samples {source}").sample(rows, min(_EACH, len(rows)))
    return {
        "source": source,
        "count": len(rows),
        "first": sum(rank == 1 for rank in ranks) / len(ranks) if ranks else None,
        "among_ten": sum(rank is not None and rank <= 10 for rank in ranks) / len(ranks) if ranks else None,
        "samples": [_sample(row, table) for row in drawn],
    }


def _sample(row: Example, table: PassageTable) -> dict[str, str]:
    told = [f"{name} {row.provenance[name]}" for name in _TOLD if name in row.provenance]
    if "rank" in row.provenance:
        told.append(f"rank of its passage {row.provenance['rank'] or 'none'}")
    text = " ".join(table[table.position(row.positives[0])].content.split())
    return {
        "query": row.query,
        "from": ", ".join(told),
        "positive": f"{row.positives[0]}: {text[:_SHOWN]}{' ...' if len(text) > _SHOWN else ''}",
    }
