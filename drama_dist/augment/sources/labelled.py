"""People's queries as training data, with judgements of them or without.

Covers reading both, and which training passages are the judged ones: of a long passage all its windows. Test queries
are left out by the stage, as from everything that is written.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from drama_dist.augment.written import WrittenQuery
from drama_dist.corpus.collection import PassageTable, Qrels
from drama_dist.corpus.read import SetAside, read_judged, read_queries
from drama_dist.corpus.split import lower_if_capitals
from drama_dist.corpus.windows import windows_by_passage
from drama_dist.records import Query
from drama_dist.settings import AugmentSettings, CorpusSettings


def read_log(augment: AugmentSettings, corpus: CorpusSettings, aside: SetAside) -> list[Query]:
    """The queries of augment.queries; raises ValueError where none can be used."""
    assert augment.queries is not None
    queries = read_queries(Path(augment.queries), corpus, aside, "augment.queries")
    if not corpus.lower_capitals:
        return queries
    return [replace(query, text=lower_if_capitals(query.text)) for query in queries]


def labelled_queries(
    augment: AugmentSettings, corpus: CorpusSettings, passages: PassageTable, windows: PassageTable, aside: SetAside
) -> list[WrittenQuery]:
    """The queries of augment.queries in order; equal ones stand once, with the judgements of all.

    passages: that judgements name; those of others, which may have been left out of the corpus, are unwanted. windows:
    that training reads. Raises ValueError where no record of a file can be used.
    """
    queries = read_log(augment, corpus, aside)
    qrels: Qrels = {}
    if augment.judgements is not None:
        ids, remedy = {query.id for query in queries}, "correct augment.judgements, or set it to null"
        qrels = read_judged(Path(augment.judgements), ids, set(passages.ids), aside, remedy, of_others=True)
    of_passage = windows_by_passage(windows.ids, passages.ids) if qrels else {}
    written: dict[str, WrittenQuery] = {}
    for query in queries:
        before = written.get(query.text, WrittenQuery(query.text, "", "", query.language, {"query": query.id}))
        judged, irrelevant = dict.fromkeys(before.judged), dict.fromkeys(before.irrelevant)
        for passage, grade in qrels.get(query.id, {}).items():
            (judged if grade > 0 else irrelevant).update(dict.fromkeys(of_passage.get(passage, ())))
        source = "labelled" if judged else "logged"
        written[query.text] = replace(before, source=source, judged=tuple(judged), irrelevant=tuple(irrelevant))
    return list(written.values())
