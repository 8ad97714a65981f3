"""A stored collection: a memory-mapped table of passages, test queries and judgements.

Covers writing and opening it. The training corpus is a collection; evaluation takes others too. Does not cover
importing one: read.py and judgements.py do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from datasets import Dataset, Features, Value
from datasets.arrow_writer import ArrowWriter
from datasets.table import MemoryMappedTable

from drama_dist.corpus.formats import open_dataset
from drama_dist.records import BadRecord, Passage, Query, read_records, write_records
from drama_dist.run.files import hash_file

Qrels = dict[str, dict[str, int]]
_FEATURES = Features({name: Value("string") for name in ("id", "text", "title", "language")})
_TEXTS_AT_ONCE = 1024
HIGHEST_GRADE = 1_000_000  # the measures take time and memory for every grade up to the highest


class PassageTable:
    """Passages in a fixed order, looked up by position or id; texts stay on disk."""

    def __init__(self, rows: Dataset):
        self._rows = rows

    @classmethod
    def open(cls, folder: Path) -> PassageTable:
        """Open a table that `write` made."""
        return cls(open_dataset(folder))

    @classmethod
    def in_memory(cls, passages: Iterable[Passage]) -> PassageTable:
        """A table of these passages that lies on no disk."""
        return cls(Dataset.from_list([vars(passage) for passage in passages], features=_FEATURES))

    @staticmethod
    def write(folder: Path, passages: Iterable[Passage]) -> None:
        """Store passages in the given order; memory holds a few of them at a time."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        rows = folder.with_name(f"{folder.name}.tmp")  # save_to_disk refuses to read from the folder that it writes
        with ArrowWriter(path=str(rows), features=_FEATURES) as writer:
            for passage in passages:
                writer.write(vars(passage))
            writer.finalize()
        table = MemoryMappedTable.from_file(str(rows))
        Dataset(table, fingerprint=hash_file(rows)).save_to_disk(str(folder))  # by itself it has the time in it
        rows.unlink()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, position: int) -> Passage:
        return Passage(**self._rows[int(position)])

    @property
    def rows(self) -> Dataset:
        """The table: a row for each passage, with id, text, title and language."""
        return self._rows

    @cached_property
    def ids(self) -> list[str]:
        return list(self._rows["id"])

    @property
    def languages(self) -> list[str]:
        return list(self._rows["language"])

    def languages_of(self, positions: Sequence[int]) -> list[str]:
        """The language of each passage; reads only these rows."""
        return list(self._rows.select_columns("language")[[int(position) for position in positions]]["language"])

    @cached_property
    def _positions(self) -> dict[str, int]:
        return {id: position for position, id in enumerate(self.ids)}

    def position(self, id: str) -> int:
        """Position of a passage; raises ValueError naming the id if there is none."""
        position = self.find(id)
        if position is None:
            raise ValueError(f"no passage {id!r} in the corpus: the examples were made from another one")
        return position

    def find(self, id: str) -> int | None:
        """Position of a passage; None if there is none."""
        return self._positions.get(id)

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
class Collection:
    """Passages, test queries, and qrels: query id -> passage id -> relevance."""

    passages: PassageTable
    queries: list[Query]
    qrels: Qrels

    @property
    def language(self) -> str:
        """The most common one of the queries; of the passages where there are none."""
        languages = Counter(query.language for query in self.queries) or Counter(self.passages.languages)
        return languages.most_common(1)[0][0]


def open_collection(folder: Path) -> Collection:
    """Open what `write_collection` wrote."""
    queries = read_records(folder / "queries.jsonl", lambda value: Query(**value))
    return Collection(PassageTable.open(folder / "passages"), queries, read_qrels(folder / "qrels" / "test.tsv"))


def write_collection(folder: Path, passages: Iterable[Passage], queries: Iterable[Query], qrels: Qrels) -> None:
    """Store a collection in a folder."""
    PassageTable.write(folder / "passages", passages)
    write_records(folder / "queries.jsonl", queries)
    write_qrels(folder / "qrels" / "test.tsv", qrels)


def write_qrels(path: Path, qrels: Qrels) -> None:
    """Write judgements as BEIR does: a header, then query, passage and score, tab separated."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [f"{query}\t{passage}\t{score}\n" for query, judged in qrels.items() for passage, score in judged.items()]
    path.write_text("query-id\tcorpus-id\tscore\n" + "".join(rows), "utf-8")


def read_qrels(path: Path) -> Qrels:
    """Read what `write_qrels` wrote; raises BadRecord for a line of another kind."""
    qrels: Qrels = {}
    for line, row in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            query, passage, grade = row.split("\t")
            if line > 1:
                qrels.setdefault(query, {})[passage] = int(grade)
        except ValueError:
            raise BadRecord(path, line, "expected query, passage and grade", row) from None
    return qrels
