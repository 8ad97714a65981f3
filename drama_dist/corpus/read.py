"""Importing a corpus: BEIR folders, JSONL files, Hugging Face datasets on disk.

Records that cannot be used are set aside with file, line, value and reason, and counted; nothing is dropped silently.
Does not cover cleaning and sampling: stage.py does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drama_dist.corpus.collection import Qrels, parse_qrels
from drama_dist.records import BadRecord, Passage, Query, parse_json_lines
from drama_dist.run.progress import say

_ID_KEYS = ("_id", "id", "docid")
_TEXT_KEYS = ("text", "contents", "content")
_DATASET_FILES = ("dataset_info.json", "dataset_dict.json", "state.json")


@dataclass
class SetAside:
    """Records left out: unusable ones, which count against the limit, and unwanted ones."""

    unusable: list[BadRecord] = field(default_factory=list)
    unwanted: list[BadRecord] = field(default_factory=list)
    seen: int = 0

    def refuse_beyond(self, limit: float, kept_in: Path) -> None:
        """Raise ValueError if more than the fraction `limit` of all records is unusable."""
        if len(self.unusable) > limit * max(1, self.seen):
            first = "\n".join(f"  {record}" for record in self.unusable[:5])
            raise ValueError(
                f"{len(self.unusable)} of {self.seen} records cannot be used, more than "
                f"corpus.bad_record_limit={limit} allows; the first:\n{first}\n"
                f"All are in {kept_in}. Fix them, or raise the limit."
            )

    def as_rows(self) -> list[dict[str, Any]]:
        """One row per record, for set_aside.jsonl."""
        return [
            {"file": record.path, "line": record.line, "reason": record.reason, "value": str(record.value)[:500]}
            for record in [*self.unusable, *self.unwanted]
        ]


@dataclass
class RawCorpus:
    """A corpus as it was read; qrels is empty if it has no judgements."""

    passages: list[Passage]
    queries: list[Query]
    qrels: Qrels


def read_corpus(path: Path, language: str, aside: SetAside, setting: str = "corpus.path") -> RawCorpus:
    """Read a corpus in any supported format.

    Raises ValueError if the format is not recognised or there is no usable passage.
    """
    source_files(path, setting)
    if path.is_file():
        corpus = RawCorpus(_passages(path, parse_json_lines(path), language, aside), [], {})
    elif (path / "corpus.jsonl").exists():
        corpus = _read_beir(path, language, aside)
    else:
        corpus = RawCorpus(_passages(path, _dataset_rows(path), language, aside), [], {})
    if not corpus.passages:
        raise ValueError(f"{setting}={path}: no usable passage among {aside.seen} records")
    return corpus


def source_files(path: Path, setting: str = "corpus.path") -> list[Path]:
    """The files that `read_corpus` reads; other files in the folder do not change the corpus.

    Raises ValueError if the format is not recognised.
    """
    if path.is_file():
        return [path]
    if (path / "corpus.jsonl").exists():
        judgements = _qrels_file(path)
        return [path / "corpus.jsonl", *([path / "queries.jsonl", judgements] if judgements else [])]
    if any((path / name).exists() for name in _DATASET_FILES):
        return sorted(file for file in path.rglob("*") if file.suffix in (".arrow", ".json"))
    raise ValueError(
        f"{setting}={path}: expected a BEIR folder (with corpus.jsonl), a JSONL file, or a Hugging Face dataset "
        f"saved on disk; found {sorted(entry.name for entry in path.iterdir())[:5]}"
    )


def _read_beir(folder: Path, language: str, aside: SetAside) -> RawCorpus:
    source = folder / "corpus.jsonl"
    passages = _passages(source, parse_json_lines(source), language, aside)
    judgements = _qrels_file(folder)
    if judgements is None:
        return RawCorpus(passages, [], {})
    if not (folder / "queries.jsonl").exists():
        raise FileNotFoundError(f"{folder / 'queries.jsonl'}: not found, but {judgements} judges its queries")
    queries = _queries(folder / "queries.jsonl", language, aside)
    qrels = _judgements(judgements, {query.id for query in queries}, {passage.id for passage in passages}, aside)
    return RawCorpus(passages, [query for query in queries if query.id in qrels], qrels)


def _qrels_file(folder: Path) -> Path | None:
    paths = sorted((folder / "qrels").glob("*.tsv"))
    return next((path for path in paths if path.stem == "test"), paths[0] if paths else None)


def _dataset_rows(folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    from datasets import Dataset, load_from_disk

    rows = load_from_disk(str(folder))
    if not isinstance(rows, Dataset):
        split = next((name for name in ("corpus", "train") if name in rows), next(iter(rows)))
        say(f"{folder}: has the splits {', '.join(rows)}; reading {split}")
        rows = rows[split]
    for line, row in enumerate(rows, 1):
        yield line, {"id": f"row-{line}", **row}


def _passages(
    path: Path, lines: Iterator[tuple[int, dict[str, Any] | BadRecord]], language: str, aside: SetAside
) -> list[Passage]:
    passages: dict[str, Passage] = {}
    for line, value in lines:
        aside.seen += 1
        passage = value if isinstance(value, BadRecord) else _passage(path, line, value, language)
        if isinstance(passage, Passage) and passage.id in passages:
            passage = BadRecord(path, line, "duplicate id", passage.id)
        if isinstance(passage, BadRecord):
            aside.unusable.append(passage)
        else:
            passages[passage.id] = passage
    return list(passages.values())


def _passage(path: Path, line: int, value: dict[str, Any], language: str) -> Passage | BadRecord:
    id, text, title = _first(value, _ID_KEYS), _first(value, _TEXT_KEYS), value.get("title") or ""
    if id is None:
        return BadRecord(path, line, f"no id (looked for {', '.join(_ID_KEYS)})", value)
    if not isinstance(text, str) or not isinstance(title, str) or not (text.strip() or title.strip()):
        return BadRecord(path, line, f"no text (looked for {', '.join(_TEXT_KEYS)})", value)
    return Passage(str(id), text.strip(), title.strip(), str(value.get("language") or language))


def _queries(path: Path, language: str, aside: SetAside) -> list[Query]:
    queries: dict[str, Query] = {}
    for line, value in parse_json_lines(path):
        aside.seen += 1
        query = value if isinstance(value, BadRecord) else _query(path, line, value, language)
        if isinstance(query, Query) and query.id in queries:
            query = BadRecord(path, line, "duplicate id", query.id)
        if isinstance(query, BadRecord):
            aside.unusable.append(query)
        else:
            queries[query.id] = query
    return list(queries.values())


def _query(path: Path, line: int, value: dict[str, Any], language: str) -> Query | BadRecord:
    id, text = _first(value, _ID_KEYS), value.get("text")
    if id is None:
        return BadRecord(path, line, f"no id (looked for {', '.join(_ID_KEYS)})", value)
    if not isinstance(text, str) or not text.strip():
        return BadRecord(path, line, "a query without text", value)
    return Query(str(id), text.strip(), str(value.get("language") or language))


def _judgements(path: Path, queries: set[str], passages: set[str], aside: SetAside) -> Qrels:
    qrels: Qrels = {}
    for line, row in parse_qrels(path):
        aside.seen += 1
        if isinstance(row, BadRecord):
            aside.unusable.append(row)
            continue
        query, passage, score = row
        if query not in queries:
            aside.unusable.append(BadRecord(path, line, "judges a query that is not in queries.jsonl", query))
        elif passage not in passages:
            aside.unusable.append(BadRecord(path, line, "names a passage that is not in corpus.jsonl", passage))
        else:
            qrels.setdefault(query, {})[passage] = score
    return qrels


def _first(value: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return next((value[key] for key in keys if value.get(key) is not None), None)
