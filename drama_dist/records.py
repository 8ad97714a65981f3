"""The records that stages exchange, and their JSON Lines form.

Covers Passage, Query, Example, Hit, and reading and writing JSONL with errors that name file, line and value. Does not
cover where the files are (run/folder.py) or how other formats are read (corpus/read.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from drama_dist.run.files import put_in_place

Record = TypeVar("Record")


class BadRecord(ValueError):
    """A record that cannot be used; the message names the file, line, value and reason."""

    def __init__(self, path: Path | str, line: int, reason: str, value: object = None):
        self.path, self.line, self.reason, self.value = str(path), line, reason, value
        shown = "" if value is None else f": {str(value)[:120]!r}"
        super().__init__(f"{path}:{line}: {reason}{shown}")


@dataclass(frozen=True)
class Passage:
    """A text that can be retrieved."""

    id: str
    text: str
    title: str = ""
    language: str = ""

    @property
    def content(self) -> str:
        """Title and text as the encoder reads them."""
        return f"{self.title} {self.text}" if self.title else self.text


@dataclass(frozen=True)
class Query:
    """A text that is searched with."""

    id: str
    text: str
    language: str = ""


@dataclass(frozen=True)
class Hit:
    """One retrieved passage; a higher score is better."""

    passage_id: str
    score: float


@dataclass(frozen=True)
class Example:
    """One training example: a query and the ids of its positives and hard negatives.

    source: crop, synthetic, rerank, triplet or labelled. provenance: the passage, model, prompt version and seed that
    it was made from.
    """

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    source: str
    language: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Example:
        lists = {name: tuple(value[name]) for name in ("positives", "negatives")}
        return cls(**{**value, **lists})


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object); raise BadRecord on invalid UTF-8, invalid JSON or a non-object.

    The error is raised when the bad line is reached; to skip bad lines use `parse_json_lines`.
    """
    for line, value in parse_json_lines(path):
        if isinstance(value, BadRecord):
            raise value
        yield line, value


def parse_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | BadRecord]]:
    """Yield (line number from 1, object), or a BadRecord in place of an object that cannot be read."""
    with open(path, "rb") as file:
        for line, raw in enumerate(file, 1):
            if raw.strip():
                yield line, _parse_line(path, line, raw)


def _parse_line(path: Path, line: int, raw: bytes) -> dict[str, Any] | BadRecord:
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRecord(path, line, f"invalid UTF-8 at byte {error.start}", raw[:60])
    except json.JSONDecodeError as error:
        return BadRecord(path, line, f"not JSON ({error.msg})", raw.decode("utf-8").strip())
    if not isinstance(value, dict):
        return BadRecord(path, line, "expected a JSON object", value)
    return value


def read_records(path: Path, build: Callable[[dict[str, Any]], Record]) -> list[Record]:
    """Read a JSONL file that this program wrote, one record per line.

    Raises BadRecord if a line lacks a field or has an unknown one.
    """
    records = []
    for line, value in read_json_lines(path):
        try:
            records.append(build(value))
        except (TypeError, KeyError) as error:
            raise BadRecord(path, line, f"unexpected fields ({error})", value) from error
    return records


def write_records(path: Path, records: Iterable[Any]) -> int:
    """Write dataclass records (or dicts) as JSONL under a temporary name, then rename it; return the count."""
    temporary = path.with_name(path.name + ".tmp")
    count = 0
    with open(temporary, "w", encoding="utf-8") as out:
        for record in records:
            value = record if isinstance(record, dict) else asdict(record)
            out.write(json.dumps(value, ensure_ascii=False) + "\n")
            count += 1
    put_in_place(temporary, path)
    return count
