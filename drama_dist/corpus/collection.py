"""The stored corpus: a memory-mapped table of passages, test queries and judgements.

Covers writing and opening the corpus stage's artefact. How a corpus is read from elsewhere is in read.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from datasets import Dataset, Features, Value, load_from_disk

from drama_dist.records import BadRecord, Passage, Query, read_records

Qrels = dict[str, dict[str, int]]
_FEATURES = Features({name: Value("string") for name in ("id", "text", "title", "language")})
_TEXTS_AT_ONCE = 1024


class PassageTable:
    """Passages in a fixed order, by position or id; texts stay on disk."""

    def __init__(self, rows: Dataset):
        self._rows = rows

    @classmethod
    def open(cls, folder: Path) -> PassageTable:
        """Open a table that `write` made."""
        return cls(load_from_disk(str(folder)))

    @staticmethod
    def write(folder: Path, passages: Iterable[Passage]) -> None:
        """Store passages in the given order."""
        rows = [vars(passage) for passage in passages]
        Dataset.from_list(rows, features=_FEATURES).save_to_disk(str(folder))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, position: int) -> Passage:
        return Passage(**self._rows[int(position)])

    @cached_property
    def ids(self) -> list[str]:
        return list(self._rows["id"])

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {id: position for position, id in enumerate(self.ids)}

    def position(self, id: str) -> int:
        """Raises KeyError naming the id where there is no such passage."""
        if id not in self._positions:
            raise KeyError(f"no passage {id!r} in the corpus")
        return self._positions[id]

    def contents(self, positions: Sequence[int]) -> list[str]:
        """What the encoder reads of each passage (title and text)."""
        rows = self._rows[[int(position) for position in positions]]
        pairs = zip(rows["title"], rows["text"], strict=True)
        return [Passage("", text, title).content for title, text in pairs]

    def texts(self) -> Iterator[str]:
        """The contents of all passages in order; memory holds a few of them at a time."""
        for start in range(0, len(self), _TEXTS_AT_ONCE):
            yield from self.contents(range(start, min(start + _TEXTS_AT_ONCE, len(self))))


@dataclass(frozen=True)
class Corpus:
    """Passages, test queries, and qrels: query id -> passage id -> relevance."""

    passages: PassageTable
    queries: list[Query]
    qrels: Qrels


def open_corpus(folder: Path) -> Corpus:
    """Open the corpus stage's artefact."""
    queries = read_records(folder / "queries.jsonl", lambda value: Query(**value))
    return Corpus(PassageTable.open(folder / "passages"), queries, read_qrels(folder / "qrels" / "test.tsv"))


def write_qrels(path: Path, qrels: Qrels) -> None:
    """Write judgements as BEIR does: a header, then query, passage and score, tab separated."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [f"{query}\t{passage}\t{score}\n" for query, judged in qrels.items() for passage, score in judged.items()]
    path.write_text("query-id\tcorpus-id\tscore\n" + "".join(rows), "utf-8")


def read_qrels(path: Path) -> Qrels:
    """Read BEIR judgements; raises the first BadRecord."""
    qrels: Qrels = {}
    for _, row in parse_qrels(path):
        if isinstance(row, BadRecord):
            raise row
        query, passage, score = row
        qrels.setdefault(query, {})[passage] = score
    return qrels


def parse_qrels(path: Path) -> Iterable[tuple[int, tuple[str, str, int] | BadRecord]]:
    """Yield (line number, (query id, passage id, score) or the BadRecord that says why there is none)."""
    for number, raw in enumerate(path.read_bytes().splitlines(), 1):
        cells = raw.decode("utf-8", errors="replace").rstrip("\r").split("\t")
        if (number == 1 and cells[-1] == "score") or not raw.strip():
            continue
        if len(cells) == 3 and cells[2].lstrip("-").isdigit():
            yield number, (cells[0], cells[1], int(cells[2]))
        else:
            yield (
                number,
                BadRecord(path, number, "expected query-id, corpus-id and a whole-number score, tab separated", raw),
            )
