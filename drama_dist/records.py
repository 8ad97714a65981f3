"""The records that stages exchange, and their JSON Lines form.

Covers Passage, Query, Example, Hit, and reading and writing JSONL with errors that name file, line and value. Does not
cover where the files are (run/folder.py) or how other formats are read (corpus/read.py).
"""

from __future__ import annotations

import codecs
import json
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from drama_dist.run.files import put_in_place

LONGEST_RECORD = 2**24  # bytes, more than the longest books have
Record = TypeVar("Record")
_INVALID = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of bytes that are no UTF-8
_VALUE_SHOWN = 200  # characters that are kept of a bad record's value
_BRIEF = reprlib.Repr()  # does not go through all of a value: it may be long, or nested deeply
_BRIEF.maxlevel, _BRIEF.maxdict, _BRIEF.maxstring, _BRIEF.maxother = 2, 8, 100, 100


class BadRecord(ValueError):
    """A record that cannot be used; the message names the file, line, reason, detail and value.

    reason: the same for all records of a kind. detail: what differs from one to the next. value: its beginning as text,
    without the rest: there may be many bad records, and large ones.
    """

    def __init__(self, path: Path | str, line: int, reason: str, value: object = None, detail: str = ""):
        self.path, self.line, self.reason, self.detail = _printable(str(path)), line, reason, _printable(detail)
        self.value = None if value is None else _beginning(value)
        shown = "" if self.value is None else f": {self.value[:120]!r}"
        super().__init__(f"{self.path}:{line}: {self.problem}{shown}")

    @property
    def problem(self) -> str:
        """The reason with its detail."""
        return f"{self.reason} {self.detail}".rstrip()


def _beginning(value: object) -> str:
    if isinstance(value, bytes):
        return value[:_VALUE_SHOWN].decode("utf-8", "backslashreplace")
    return _printable((value if isinstance(value, str) else _BRIEF.repr(value))[:_VALUE_SHOWN])


def _printable(text: str) -> str:
    """The text with \\udXXX in place of lone surrogates, which no file can hold."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


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

    relevant: further passages that are no negatives, though none is drawn as the positive.
    source: crop, synthetic, labelled, logged, triplet or rerank. provenance: the passage or task, model, prompt version
    and seed that it was made from, or the query's id, or file and line.
    """

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    source: str
    language: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)
    relevant: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Example:
        lists = {name: tuple(value[name]) for name in ("positives", "negatives")}
        lists["relevant"] = tuple(value.get("relevant", ()))
        return cls(**{**value, **lists})


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object); raise BadRecord on invalid UTF-8, invalid JSON or a non-object.

    The error is raised when the bad line is reached; to skip bad lines use `parse_json_lines`.
    """
    with open(path, "rb") as file:
        for line, value in parse_json_lines(path, file):
            if isinstance(value, BadRecord):
                raise value
            yield line, value


def parse_json_lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, dict[str, Any] | BadRecord]]:
    """Yield (line number from 1, object), or a BadRecord in place of an object that cannot be read.

    An object that names keys twice is a RepeatedKeys. file: UTF-8, with or without a byte order mark. path: what errors
    call it.
    """
    for line, raw in enumerate(bounded_lines(file), 1):
        if raw.strip():
            yield line, _parse_line(path, line, raw.strip())


def bounded_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of a file, without a byte order mark; of a line over LONGEST_RECORD one byte more than that."""
    mark = codecs.BOM_UTF8
    while raw := file.readline(LONGEST_RECORD + 1):
        yield raw.removeprefix(mark)
        mark = b""
        while len(raw) > LONGEST_RECORD and not raw.endswith(b"\n"):
            raw = file.readline(LONGEST_RECORD + 1) or b"\n"


def invalid_utf8(path: Path, line: int, text: str) -> BadRecord | None:
    """A BadRecord if a text, which was decoded with "surrogateescape", has bytes that are no UTF-8."""
    found = _INVALID.search(text)
    if not found:
        return None
    raw = text.encode("utf-8", "surrogateescape")
    at = len(text[: found.start()].encode())
    return BadRecord(path, line, "invalid UTF-8", raw, f"at byte {at}")


def parse_json(path: Path, line: int, read: Callable[[], Any], raw: object) -> Any:
    """What `read` returns, which calls JSON's decoder; or a BadRecord that says why it failed. raw: what it reads."""
    try:
        return read()
    except UnicodeDecodeError as error:
        return BadRecord(path, line, "invalid UTF-8", raw, f"at byte {error.start}")
    except json.JSONDecodeError as error:
        return BadRecord(path, line, "not JSON", raw, f"({error.msg})")
    except RecursionError:
        return BadRecord(path, line, "nested too deeply", raw)
    except ValueError:
        return BadRecord(path, line, "a number of thousands of digits", raw)


class RepeatedKeys(dict[str, Any]):
    """A JSON object that names some keys more than once, with the last value of each; repeated: those keys."""

    def __init__(self, pairs: list[tuple[str, Any]]):
        super().__init__(pairs)
        self.repeated = frozenset(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    return value if len(value) == len(pairs) else RepeatedKeys(pairs)


JSON = json.JSONDecoder(object_pairs_hook=_object)


def _parse_line(path: Path, line: int, raw: bytes) -> dict[str, Any] | BadRecord:
    if len(raw) > LONGEST_RECORD:
        return BadRecord(path, line, f"longer than {LONGEST_RECORD >> 20} MiB", raw)
    value = parse_json(path, line, lambda: JSON.decode(raw.decode("utf-8")), raw)
    if not isinstance(value, dict | BadRecord):
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
