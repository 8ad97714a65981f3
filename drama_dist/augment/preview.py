"""A look at training queries before the long run: drama augment SETTINGS --preview N.

Covers some queries of each source, with the passages that they come from. Passages are not ranked for them yet: that
takes the teacher's vectors of the whole corpus.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from drama_dist.augment.sources.crop import crops
from drama_dist.augment.sources.labelled import labelled_queries
from drama_dist.augment.sources.queries import write_queries
from drama_dist.augment.writers.choice import writer_of
from drama_dist.augment.written import WrittenQuery
from drama_dist.corpus.collection import PassageTable, open_collection
from drama_dist.corpus.read import SetAside
from drama_dist.run.graph import CORPUS, TRAINING_TEXTS
from drama_dist.run.runner import make
from drama_dist.search.lexical import LexicalIndex
from drama_dist.settings import Settings

_SHOWN = 160  # characters of a passage


def preview(settings: Settings, count: int) -> list[str]:
    """Lines to print, of about `count` queries; makes the corpus, and BM25's index where it is needed.

    Nothing of what it writes by itself is kept. Raises as the augment stage does.
    """
    table = open_collection(make(settings, "corpus", collection=TRAINING_TEXTS)).passages
    chance = random.Random(f"{settings.seed} preview")
    positions = sorted(chance.sample(range(len(table)), min(count, len(table))))
    some = PassageTable.in_memory(table[position] for position in positions)
    written: list[WrittenQuery] = []
    augment = settings.augment
    sources = [bool(augment.crops_of(1)), bool(augment.synthetic_queries), bool(augment.queries)]
    each = max(1, count // max(1, sum(sources)))
    few = replace(augment, crops=each, crops_per_passage=0, synthetic_queries=min(each, augment.synthetic_queries))
    if sources[0]:
        built = augment.draws_keywords
        lexical = LexicalIndex(make(settings, "encode", collection=TRAINING_TEXTS, system="bm25")) if built else None
        written += crops(some, lexical, few, settings.seed)[0]
    aside: list[dict[str, Any]] = []
    if sources[1]:
        with TemporaryDirectory() as folder:
            queries, aside = write_queries(Path(folder), some, writer_of(settings), few, settings.seed)
        written += queries
    if sources[2]:
        passages = open_collection(make(settings, "corpus", collection=CORPUS)).passages
        asked = labelled_queries(augment, settings.corpus, passages, table, SetAside())
        written += chance.sample(asked, min(each, len(asked)))
    lines = [line for query in written for line in _lines(query, table)]
    return lines + [f"set aside: {row['reason']}: {row['value'][:_SHOWN]!r}" for row in aside]


def _lines(query: WrittenQuery, table: PassageTable) -> list[str]:
    kind = query.provenance.get("kind", "")
    lines = [f"{query.source}{' ' if kind else ''}{kind}: {query.query}"]
    for id in [query.passage_id] if query.passage_id else query.judged[:3]:
        text = " ".join(table[table.position(id)].content.split())
        lines.append(f"    {id}: {text[:_SHOWN]}{' ...' if len(text) > _SHOWN else ''}")
    return lines
