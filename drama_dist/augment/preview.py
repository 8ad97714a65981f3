"""A look at training queries before the long run: drama augment SETTINGS --preview N.

Covers some queries of each source, with the passages that they come from. Passages are not ranked for them yet: that
takes the teacher's vectors of the whole corpus.
"""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from drama_dist.augment.sources.crop import crops
from drama_dist.augment.sources.labelled import labelled_queries
from drama_dist.augment.sources.queries import write_queries
from drama_dist.augment.sources.triples import read_triples
from drama_dist.augment.sources.triplets import write_triplets
from drama_dist.augment.stage import check
from drama_dist.augment.triplet_stage import check as check_triplets
from drama_dist.augment.triplet_stage import with_ids
from drama_dist.augment.writers.choice import writer_of
from drama_dist.augment.written import WrittenQuery
from drama_dist.corpus.collection import PassageTable, open_collection
from drama_dist.corpus.read import SetAside
from drama_dist.corpus.windows import windows
from drama_dist.run.runner import make
from drama_dist.search.lexical import LexicalIndex
from drama_dist.settings import AugmentSettings, Settings

_SHOWN = 160  # characters of a passage


def preview(settings: Settings, count: int) -> list[str]:
    """Lines to print, of about `count` queries.

    Makes the corpus, and BM25's index where it is needed; nothing else is kept. Raises as the augment stage does, but
    for records and answers that cannot be used, which are shown.
    """
    augment = settings.augment
    check(settings)
    if augment.brings_texts:
        check_triplets(settings)
    table = open_collection(make(settings, "corpus")).passages  # not RUN/windows, which may wait for an LLM
    chance = random.Random(f"{settings.seed} preview")
    positions = sorted(chance.sample(range(len(table)), min(count, len(table))))
    drawn = PassageTable.in_memory(table[position] for position in positions)
    some = PassageTable.in_memory(windows(drawn, settings.corpus.window_words, settings.corpus.window_step))
    crops_wanted, synthetic_wanted, log_wanted = augment.crops_of(1), augment.synthetic_queries, augment.queries
    sources = crops_wanted, synthetic_wanted, log_wanted, augment.triplets, augment.labelled_triples
    each = max(1, count // sum(map(bool, sources)))
    few = replace(
        augment,
        crops=each,
        crops_per_passage=0,
        synthetic_queries=min(each, synthetic_wanted),
        triplets=min(each, augment.triplets),
        bad_answer_limit=1.0,
    )
    written: list[WrittenQuery] = []
    aside: list[dict[str, Any]] = []
    if crops_wanted:
        words = augment.draws_keywords
        lexical = LexicalIndex(make(settings, "encode", system="bm25")) if words else None
        written += crops(some, lexical, few, settings.seed)[0]
    if synthetic_wanted:
        with TemporaryDirectory() as folder:
            synthetic, aside = write_queries(Path(folder), some, writer_of(settings), few, settings.seed)
        written += synthetic
    if log_wanted:
        unfit = SetAside()
        asked = labelled_queries(augment, settings.corpus, table, table, unfit)
        written += chance.sample(asked, min(each, len(asked)))
        aside += list(unfit.as_rows())[:each]
    lines = [line for query in written for line in _lines(query, table if query.judged else some)]
    for wanted, found in ((augment.labelled_triples, _triples), (augment.triplets, _triplets)):
        if wanted:
            more, unusable = found(settings, few, each)
            lines += more
            aside += unusable
    return lines + [f"set aside: {row['reason']}: {str(row['value'])[:_SHOWN]!r}" for row in aside]


Shown = tuple[list[str], list[dict[str, Any]]]  # lines, and rows of what is set aside


def _triples(settings: Settings, few: AugmentSettings, count: int) -> Shown:
    aside = SetAside()
    texts, queries = with_ids(islice(read_triples(few, settings.corpus, aside), count))
    table = PassageTable.in_memory(texts)
    return [line for query in queries for line in _lines(query, table)], list(aside.as_rows())[:count]


def _triplets(settings: Settings, few: AugmentSettings, count: int) -> Shown:
    with TemporaryDirectory() as folder:
        writer, language = writer_of(settings), settings.corpus.language
        rows, aside = write_triplets(Path(folder), writer, few, language, settings.seed)
    lines = []
    for row in rows:
        texts = (("answer", row["positive"]), ("distractor", row["negative"]))
        lines += [f"triplet: {row['query']}", *(f"    {name}: {text[:_SHOWN]}" for name, text in texts)]
    return lines, aside


def _lines(query: WrittenQuery, table: PassageTable) -> list[str]:
    kind = query.provenance.get("kind", "")
    lines = [f"{query.source}{' ' if kind else ''}{kind}: {query.query}"]
    for id in [query.passage_id] if query.passage_id else query.judged[:3]:
        text = " ".join(table[table.position(id)].content.split())
        lines.append(f"    {id}: {text[:_SHOWN]}{' ...' if len(text) > _SHOWN else ''}")
    return lines
