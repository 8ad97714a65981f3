"""Importing a corpus: rows of any form become passages, queries and judgements.

Records that cannot be used are set aside with file, line, value and reason, and counted; nothing is dropped silently.
Which files are read is in layout.py, how in formats.py and judgements.py; cleaning and sampling in stage.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from drama_dist.corpus.collection import Qrels
from drama_dist.corpus.formats import Columns, Row, dataset_rows, open_dataset, read_rows, shown_names
from drama_dist.corpus.join import Part, joined, moved
from drama_dist.corpus.judgements import Judgement, read_judgements
from drama_dist.corpus.layout import Sources, find_sources
from drama_dist.corpus.parts import Unfit, as_unicode, id_of, language_of, part, text_of, title_of
from drama_dist.records import BadRecord, Passage, Query
from drama_dist.run.progress import say
from drama_dist.settings import CorpusSettings

_QUERY_IDS = ("query-id", "query_id", "qid")  # in queries, before corpus.id_keys: those may name the passage, too
_QUERY_TEXTS = ("query", "question")
_FIRST = 3  # bad records that an error shows


@dataclass
class SetAside:
    """Records left out: unusable ones, which count against the limit, and unwanted ones.

    mended: parts of records in which what is no Unicode became U+FFFD.
    """

    unusable: list[BadRecord] = field(default_factory=list)
    unwanted: list[BadRecord] = field(default_factory=list)
    seen: int = 0
    mended: int = 0

    def refuse_beyond(self, limit: float, kept_in: Path) -> None:
        """Raise ValueError if more than the fraction `limit` of all records is unusable."""
        if len(self.unusable) > limit * max(1, self.seen):
            first = "\n".join(f"  {record}" for record in self.unusable[:5])
            raise ValueError(
                f"{len(self.unusable)} of {self.seen} records cannot be used, more than "
                f"corpus.bad_record_limit={limit} allows; the first:\n{first}\n"
                f"All are in {kept_in}. Fix them, or raise the limit."
            )

    def tell_mended(self, name: str) -> None:
        """Say in how many texts something was mended. name: of the stage."""
        if self.mended:
            texts = "1 text" if self.mended == 1 else f"{self.mended} texts"
            say(f"{name}: in {texts}, halves of characters (\\ud800 to \\udfff) are now U+FFFD")

    @property
    def records(self) -> list[BadRecord]:
        """All of them."""
        return [*self.unusable, *self.unwanted]

    def as_rows(self) -> Iterator[dict[str, Any]]:
        """One row per record, for set_aside.jsonl."""
        for record in self.records:
            yield {"file": record.path, "line": record.line, "reason": record.problem, "value": str(record.value)}


@dataclass
class RawCorpus:
    """A corpus as it was read; qrels is empty if it has no judgements."""

    passages: list[Passage]
    queries: list[Query]
    qrels: Qrels


@dataclass(frozen=True)
class _Keys:
    """The names that a record may have its parts under; the first that is there counts."""

    ids: Sequence[str]
    texts: Sequence[str]
    titles: Sequence[str]
    languages: Sequence[str]
    wholes: Sequence[str] = ()  # what the record is a part of

    @property
    def columns(self) -> Columns:
        """What to read of files with columns."""
        names = frozenset([*self.ids, *self.texts, *self.titles, *self.languages, *self.wholes])
        remedy = "say in corpus.id_keys and corpus.text_keys which to read"
        return Columns(names, (self.ids[0], self.texts[0]), remedy)


def read_corpus(path: Path, corpus: CorpusSettings, aside: SetAside, setting: str = "corpus.path") -> RawCorpus:
    """Read a corpus in any supported form, with its queries and judgements where it has both.

    Raises ValueError if the form is not recognised, there is no usable passage, none of the judgements is usable, or
    corpus.join_by joins nothing of the run's own corpus.
    """
    sources = find_sources(path, setting)
    for note in sources.notes:
        say(f"{path}: {note}")
    by = [corpus.join_by] if corpus.join_by else []
    keys = _Keys(corpus.id_keys, corpus.text_keys, corpus.title_keys, corpus.language_keys, by)
    records = _records(rows_of(sources, keys.columns), keys, corpus.language, aside)
    if not records:
        raise ValueError(f"{setting}={path}: no usable passage among {aside.seen} records{first_of(aside.unusable)}")
    passages, whole_of = joined(records)
    if corpus.join_by:
        _tell_joined(path, setting, corpus.join_by, len(records), len(passages))
    if not sources.queries or not sources.judgements:
        return RawCorpus(passages, [], {})
    queries = _queries(sources.queries, corpus, aside)
    qrels = moved(read_judged(sources.judgements, {query.id for query in queries}, whole_of, aside), whole_of)
    return RawCorpus(passages, [query for query in queries if query.id in qrels], qrels)


def _tell_joined(path: Path, setting: str, by: str, records: int, passages: int) -> None:
    if records > passages:
        say(f"{path}: {records} records are {passages} passages, joined by {by} (corpus.join_by)")
        return
    nothing = f"{setting}={path}: corpus.join_by={by} joins nothing: no two of {records} records have the same {by}"
    if setting == "corpus.path":
        raise ValueError(f"{nothing}; name the key that tells which belong together, or set it to null")
    say(nothing)  # of texts of another origin it is no mistake


def read_queries(path: Path, corpus: CorpusSettings, aside: SetAside, setting: str) -> list[Query]:
    """Read a file of queries in any supported form; raises ValueError where none can be used."""
    queries = _queries(path, corpus, aside)
    if not queries:
        raise ValueError(f"{setting}={path}: no usable query among {aside.seen} records{first_of(aside.unusable)}")
    return queries


def _queries(path: Path, corpus: CorpusSettings, aside: SetAside) -> list[Query]:
    keys = _Keys([*_QUERY_IDS, *corpus.id_keys], [*_QUERY_TEXTS, *corpus.text_keys], (), corpus.language_keys)
    asked = _records(_file_rows([path], keys.columns), keys, corpus.language, aside)
    return [Query(query.id, query.text, query.language) for query, _ in asked]


def rows_of(sources: Sources, columns: Columns) -> Iterator[tuple[Path, Row]]:
    """The rows of the passages' files, or of the dataset, each with its file."""
    return _dataset_rows(sources.dataset, columns) if sources.dataset else _file_rows(sources.passages, columns)


def _file_rows(paths: Iterable[Path], columns: Columns) -> Iterator[tuple[Path, Row]]:
    for path in paths:
        for row in read_rows(path, columns):
            yield path, row


def _dataset_rows(folder: Path, columns: Columns) -> Iterator[tuple[Path, Row]]:
    for row in dataset_rows(folder, open_dataset(folder), columns):
        yield folder, row


def _records(rows: Iterable[tuple[Path, Row]], keys: _Keys, language: str, aside: SetAside) -> list[Part]:
    """The usable records; their numbers are their ids where not one of them has an id."""
    found: dict[str, Part] = {}
    nameless: dict[str, tuple[Part, BadRecord]] = {}
    has_ids = False
    for number, (path, (line, value)) in enumerate(rows, 1):
        aside.seen += 1
        if isinstance(value, BadRecord):
            aside.unusable.append(value)
            continue
        has_ids = has_ids or any(value.get(name) is not None for name in keys.ids)
        record = _record(path, line, value, keys, language, aside)
        if not isinstance(record, BadRecord) and not record[0].id:
            detail = f"under {', '.join(keys.ids)} (corpus.id_keys); it has {shown_names(value)}"
            nameless[f"row-{number}"] = record, BadRecord(path, line, "no id", value, detail)
            continue
        if not isinstance(record, BadRecord) and record[0].id in found:
            record = BadRecord(path, line, "duplicate id", record[0].id)
        if isinstance(record, BadRecord):
            aside.unusable.append(record)
        else:
            found[record[0].id] = record
    if nameless and not has_ids:
        first = next(iter(nameless))
        say(f"{path}: no record has an id (corpus.id_keys), so their numbers are their ids, beginning with {first}")
        return [(replace(passage, id=id), whole) for id, ((passage, whole), _) in nameless.items()]
    aside.unusable += [bad for _, bad in nameless.values()]
    return list(found.values())


def _record(
    path: Path, line: int, value: Mapping[str, Any], keys: _Keys, language: str, aside: SetAside
) -> Part | BadRecord:
    """The id is empty where there is none."""
    try:
        id = part(value, keys.ids, id_of, "id") or ""
        text = part(value, keys.texts, text_of, "text")
        title = part(value, keys.titles, title_of, "title", optional=True) or ""
        own_language = part(value, keys.languages, language_of, "language", optional=True)
        whole = part(value, keys.wholes, title_of, "what it is joined by", optional=True) or ""
    except Unfit as problem:
        return BadRecord(path, line, str(problem), value)
    if text is None or not (text or title):
        detail = f"under {', '.join(keys.texts)} (corpus.text_keys); it has {shown_names(value)}"
        return BadRecord(path, line, "no text", value, detail)
    unicode_text, unicode_title = as_unicode(text), as_unicode(title)
    aside.mended += (unicode_text != text) + (unicode_title != title)
    return Passage(id, unicode_text, unicode_title, own_language or language), whole


def read_judged(
    path: Path,
    queries: Collection[str],
    passages: Collection[str],
    aside: SetAside,
    remedy: str = "mend it, or take it away to have test queries held out",
    of_others: bool = False,
) -> Qrels:
    """Judgements of queries and passages that there are; raises ValueError, with the remedy, if there is none.

    of_others: judgements of other queries and passages are expected too, and are unwanted, not unusable.
    """
    qrels: Qrels = {}
    before, seen = len(aside.unusable), 0
    for line, row in read_judgements(path):
        seen += 1
        if isinstance(row, BadRecord):
            aside.unusable.append(row)
        elif foreign := _foreign(path, line, row, queries, passages):
            (aside.unwanted if of_others else aside.unusable).append(foreign)
        elif qrels.get(row[0], {}).get(row[1], row[2]) != row[2]:
            aside.unusable.append(BadRecord(path, line, "judges a passage again, with another grade", row[1]))
        else:
            query, passage, grade = row
            qrels.setdefault(query, {})[passage] = grade
    aside.seen += seen
    if not qrels:
        first = [*aside.unusable[before:], *(aside.unwanted if of_others else ())]
        problem = f"no usable judgement among {seen}{first_of(first)}" if seen else "has no judgements"
        raise ValueError(f"{path}: {problem}; {remedy}")
    return qrels


def _foreign(
    path: Path, line: int, row: Judgement, queries: Collection[str], passages: Collection[str]
) -> BadRecord | None:
    """Why a judgement is not of these queries and passages."""
    query, passage, _ = row
    if query not in queries:
        return BadRecord(path, line, "judges a query that is not among the queries", query)
    if passage not in passages:
        return BadRecord(path, line, "names a passage that is not in the corpus", passage)
    return None


def first_of(records: Sequence[BadRecord]) -> str:
    """The first few bad records, to end an error with."""
    return "; the first: " + "; ".join(map(str, records[:_FIRST])) if records else ""
