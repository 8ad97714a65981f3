"""People's queries as training data, with judgements of them or without.

Covers reading both, and which training passages are the judged ones: of a long passage all its windows. Test queries
are left out by the stage, as from everything that is written. Where the query logs come from is not known here.
"""

from __future__ import annotations

from pathlib import Path

from drama_dist.augment.written import WrittenQuery
from drama_dist.corpus.collection import PassageTable
from drama_dist.corpus.read import SetAside, read_judged, read_queries
from drama_dist.corpus.windows import windows_by_passage
from drama_dist.settings import AugmentSettings, CorpusSettings


def labelled_queries(
    augment: AugmentSettings, corpus: CorpusSettings, passages: PassageTable, windows: PassageTable, aside: SetAside
) -> list[WrittenQuery]:
    """The queries of augment.queries in order; equal ones stand once, with the judgements of all.

    passages: that judgements name. windows: that training reads. Raises ValueError where no record of a file can be
    used.
    """
    assert augment.queries is not None
    queries = read_queries(Path(augment.queries), corpus, aside, "augment.queries")
    judged: dict[str, list[str]] = {}
    if augment.judgements is not None:
        path = Path(augment.judgements)
        qrels = read_judged(path, {query.id for query in queries}, set(passages.ids), aside)
        of_passage = windows_by_passage(windows.ids, set(passages.ids))
        for id, grades in qrels.items():
            relevant = [passage for passage, grade in grades.items() if grade > 0]
            judged[id] = [window for passage in relevant for window in of_passage.get(passage, ())]
    written: dict[str, WrittenQuery] = {}
    for query in queries:
        before = written.get(query.text)
        windows_of_it = dict.fromkeys([*(before.judged if before else ()), *judged.get(query.id, ())])
        provenance = before.provenance if before else {"query": query.id}
        source = "labelled" if windows_of_it else "logged"
        written[query.text] = WrittenQuery(query.text, "", source, query.language, provenance, tuple(windows_of_it))
    return list(written.values())
