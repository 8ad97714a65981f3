"""Files of records, in the forms that people have them in, as rows: JSON Lines, JSON, CSV, TSV, parquet, datasets.

Gzip is unpacked, and UTF-16 is read where a byte order mark says so. What a file is, its beginning decides, and its
name where that is open. Does not know what the columns mean: read.py does.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

from drama_dist.records import JSON, LONGEST_RECORD, BadRecord, bounded_lines, parse_json, parse_json_lines
from drama_dist.run.progress import say

Row = tuple[int, dict[str, Any] | BadRecord]  # and its line, or its number where the file has no lines
Form = Literal["json lines", "json", "csv", "tsv", "parquet", "text"]
SUFFIXES = (".jsonl", ".ndjson", ".json", ".tsv", ".csv", ".parquet")  # of files with rows; .gz may follow

_HEAD = 2**20  # bytes that show what a file is
_FIRST_LINES = 20  # decide together, because any one may be damaged
_ROWS_AT_ONCE = 1024
_LINES_OF_A_ROW = 1000  # a quoted field may have line breaks; a quote that is never closed must not take the whole file
_BETWEEN = re.compile(r"[\s,]*")
_BYTE_ORDER_MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32"}  # before those they begin with
_BYTE_ORDER_MARKS |= {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_NOT_ROWS = {
    b"version https://git-lfs": "a git LFS pointer in place of the file: fetch it with `git lfs pull`",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"BZh": "packed with bzip2: unpack it",
    b"\xfd7zXZ": "packed with xz: unpack it",
    b"\x28\xb5\x2f\xfd": "packed with zstd: unpack it",
    b"ARROW1": "an Arrow file: name the folder that Dataset.save_to_disk wrote",
    b"\xff\xff\xff\xff": "an Arrow file: name the folder that Dataset.save_to_disk wrote",
    b"%PDF": "a PDF",
    b"<!doctype": "HTML",
    b"<html": "HTML",
    b"<?xml": "XML",
}


@dataclass(frozen=True)
class Columns:
    """Which columns are wanted.

    names: others may be left out. pair: what the two columns of a TSV file without a header are. remedy: what to do
    where there is no column of these names.
    """

    names: frozenset[str]
    pair: tuple[str, str] | None
    remedy: str

    def missing(self, path: Path, found: Iterable[str]) -> ValueError:
        """The error where no column has one of the names."""
        return ValueError(f"{path}: no column has a name that is known; it has {shown_names(found)}: {self.remedy}")


def suffix_of(path: Path) -> str:
    """The last part of a name in small letters, .gz left out: .jsonl of corpus.JSONL.gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


@contextmanager
def open_data(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading: unpacked, and text in UTF-8. Raises ValueError where that cannot be done."""
    with open(path, "rb") as packed:
        is_packed = packed.read(2) == b"\x1f\x8b"
        packed.seek(0)
        file: BinaryIO = gzip.GzipFile(fileobj=packed) if is_packed else packed  # type: ignore[assignment]
        try:
            head = file.read(_HEAD)
            file.seek(0)
            encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if head.startswith(mark)), None)
            if encoding and b"\0" in head:  # as every blank and line break has; else it is a damaged line of UTF-8
                yield io.BytesIO(file.read().decode(encoding, "replace").encode())
            else:
                yield file
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: a damaged gzip file ({error}); make or fetch it again") from None


def form_of(path: Path) -> Form:
    """What kind of file it is; "text" where it is none of the others. Raises ValueError for what holds no rows."""
    with open_data(path) as file:
        head = file.read(_HEAD)
    if head.startswith(b"PAR1"):
        return "parquet"
    begins = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if seen := next((what for magic, what in _NOT_ROWS.items() if begins[:40].lower().startswith(magic.lower())), None):
        raise ValueError(f"{path}: seems to be {seen}")
    if head[:100].count(0) > len(head[:100]) / 4:
        raise ValueError(f"{path}: seems to be UTF-16 without a byte order mark, or no text; save it in UTF-8")
    if begins.startswith((b"{", b"[")) or suffix_of(path) in (".jsonl", ".ndjson", ".json"):
        return "json" if _is_one_json_text(begins) else "json lines"
    if suffix_of(path) == ".csv":
        return "csv"
    first = begins.split(b"\n", _FIRST_LINES)[:_FIRST_LINES]
    return "tsv" if 2 * sum(b"\t" in line for line in first) > len(first) - first.count(b"") else "text"


def read_rows(path: Path, columns: Columns) -> Iterator[Row]:
    """Yield the rows of a file; of parquet with None in columns that are not wanted.

    Raises ValueError naming the file where it is of another form, has none of the columns, or is damaged.
    """
    form = form_of(path)
    if form == "text":
        raise ValueError(f"{path}: seems to be plain text: expected JSON Lines, JSON, CSV, TSV or parquet")
    with open_data(path) as file:
        if form == "json lines":
            yield from parse_json_lines(path, file)
        elif form == "json":
            yield from _json_rows(path, file.read().decode("utf-8-sig", "surrogateescape"))
        elif form == "parquet":
            yield from _parquet_rows(path, file, columns)
        else:
            yield from _table_rows(path, file, form, columns)


def open_dataset(folder: Path) -> Any:
    """Open a datasets.Dataset or DatasetDict on disk; raises ValueError naming the folder."""
    from datasets import load_from_disk

    try:
        return load_from_disk(str(folder))
    except Exception as error:  # which types the library raises changes between versions
        raise ValueError(f"{folder}: not a dataset that can be opened ({_first_line(error)})") from None


def dataset_rows(folder: Path, rows: Any, columns: Columns) -> Iterator[Row]:
    """Yield the rows of a datasets.Dataset, with None in columns that are not wanted."""
    wanted = [name for name in rows.column_names if name in columns.names]
    if not wanted:
        raise columns.missing(folder, rows.column_names)
    tables = rows.select_columns(wanted).with_format("arrow").iter(batch_size=_ROWS_AT_ONCE)
    yield from _arrow_rows(folder, tables, rows.column_names)


def _is_one_json_text(begins: bytes) -> bool:
    """Whether JSON goes over several lines, or is a list of objects: not where lines are objects by themselves."""
    text = begins.decode("utf-8", "ignore")
    first, *others = text.split("\n", _FIRST_LINES)[:_FIRST_LINES]
    if _is_object(first) or sum(map(_is_object, others)) > 1:
        return False
    start = len(text) - len(text.removeprefix("[").lstrip())
    value = parse_json(Path(), 1, lambda: JSON.raw_decode(text, start)[0], "")
    return isinstance(value, dict)


def _is_object(line: str) -> bool:
    return isinstance(parse_json(Path(), 1, lambda: JSON.decode(line), ""), dict)


def _json_rows(path: Path, text: str) -> Iterator[Row]:
    """Objects one after the other, in a list or not, each with the line where it begins.

    After one that cannot be read it goes on at the next line that begins as the first object's did; ValueError where
    objects have no lines of their own, or the file is cut.
    """
    start = _next(text, text.find("[") + 1 if text.lstrip().startswith("[") else 0)
    before = text[text.rfind("\n", 0, start) + 1 : start]  # of an object on its first line
    is_whole = not before.strip() and text.rstrip().endswith(("]", "}"))
    line, counted = 1, 0
    while start < len(text) and text[start] != "]":
        line, counted = line + text.count("\n", counted, start), start
        read = partial(JSON.raw_decode, text, start)
        found = parse_json(path, line, read, text[start : start + LONGEST_RECORD])
        if isinstance(found, BadRecord):
            again = text.find(f"\n{before}{{", start)
            if again < 0 and not is_whole:
                raise ValueError(f"{found}; nothing after it can be read")
            yield line, found
            start = again + 1 + len(before) if again >= 0 else len(text)
        else:
            value, end = found
            is_object = isinstance(value, dict)
            yield line, value if is_object else BadRecord(path, line, "expected a JSON object", value)
            start = _next(text, end)


def _next(text: str, end: int) -> int:
    """Where the next object begins."""
    between = _BETWEEN.match(text, end)
    return between.end() if between else end


def _table_rows(path: Path, file: BinaryIO, form: Form, columns: Columns) -> Iterator[Row]:
    """Rows under the names of the header, or under columns.pair."""
    lines = list(_decoded(path, file))
    header: Sequence[str] | None = None
    unquote = form == "tsv"
    for line, cells in _csv_cells(path, lines) if form == "csv" else _tsv_cells(lines):
        if isinstance(cells, BadRecord):
            yield line, cells
            continue
        if header is None:
            header = _header(path, cells, columns)
            if header:
                continue
            if form == "csv" or not _has_pairs(lines) or not columns.pair:
                raise columns.missing(path, cells)
            header, unquote = columns.pair, False
            say(f"{path}: its first line names no known column; its columns are read as {' and '.join(header)}")
        if len(cells) != len(header):
            yield line, BadRecord(path, line, f"expected {len(header)} columns", cells, f"and found {len(cells)}")
        else:
            yield line, dict(zip(header, map(_unquoted, cells) if unquote else cells, strict=True))


def _has_pairs(lines: Sequence[str | BadRecord]) -> bool:
    """Whether most of the first lines have two columns: one of them may be damaged."""
    first = [line.count("\t") == 1 for line in lines[:_FIRST_LINES] if isinstance(line, str) and line.strip()]
    return 2 * sum(first) > len(first)


def _header(path: Path, cells: Sequence[str], columns: Columns) -> list[str] | None:
    """The header's names, in small letters where they are not known as they are; None if it is no header."""
    header = [cell if cell in columns.names else _unquoted(cell.strip()).lower() for cell in cells]
    known = Counter(name for name in header if name in columns.names)
    if known and max(known.values()) > 1:
        raise ValueError(f"{path}:1: two columns are called {max(known, key=lambda name: known[name])!r}")
    return header if known else None


def shown_names(names: Iterable[str]) -> str:
    """The first few names, for a message."""
    all_names = [repr(name)[1:-1][:40] for name in names]
    return ", ".join(all_names[:8]) + (", ..." if len(all_names) > 8 else "") if all_names else "none"


def _tsv_cells(lines: Sequence[str | BadRecord]) -> Iterator[tuple[int, list[str] | BadRecord]]:
    for line, text in enumerate(lines, 1):
        if isinstance(text, BadRecord):
            yield line, text
        elif text.strip():
            yield line, text.rstrip("\r\n").split("\t")


def _csv_cells(path: Path, lines: Sequence[Any]) -> Iterator[tuple[int, list[str] | BadRecord]]:
    first = next((line for line in lines if isinstance(line, str) and line.strip()), "")
    delimiter = max(",;\t", key=first.count)
    csv.field_size_limit(LONGEST_RECORD)
    start = 0
    while start < len(lines):
        number = start + 1
        if isinstance(lines[start], BadRecord):
            yield number, lines[start]
            start += 1
            continue
        reader = csv.reader(lines[start : start + _LINES_OF_A_ROW], delimiter=delimiter, strict=True)
        try:
            cells = next(reader)
        except csv.Error as error:
            yield number, BadRecord(path, number, "not CSV", lines[start], f"({error})")
            start += 1
            continue
        start += reader.line_num
        if any(cell.strip() for cell in cells):
            yield number, cells


def _unquoted(cell: str) -> str:
    """A cell without the quotes that spreadsheets put around it; as it is where a quote in it is not doubled."""
    inner = cell[1:-1]
    quoted = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if quoted else cell


def _decoded(path: Path, file: BinaryIO) -> Iterator[str | BadRecord]:
    for line, raw in enumerate(bounded_lines(file), 1):
        try:
            yield raw.decode("utf-8")
        except UnicodeDecodeError as error:
            yield BadRecord(path, line, "invalid UTF-8", raw, f"at byte {error.start}")


def _parquet_rows(path: Path, file: BinaryIO, columns: Columns) -> Iterator[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(file)
        names = table.schema_arrow.names
        wanted = [name for name in names if name in columns.names]
        if wanted:
            yield from _arrow_rows(path, table.iter_batches(_ROWS_AT_ONCE, columns=wanted), names)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: a damaged parquet file ({_first_line(error)})") from None
    if not wanted:
        raise columns.missing(path, names)


def _arrow_rows(path: Path, tables: Iterable[Any], names: Sequence[str]) -> Iterator[Row]:
    """Rows of Arrow tables, with None for names of which the tables have no column."""
    number = 0
    for table in tables:
        for row in _as_dicts(path, number, table):
            number += 1
            yield number, row if isinstance(row, BadRecord) else {**dict.fromkeys(names), **row}


def _as_dicts(path: Path, before: int, table: Any) -> Iterator[dict[str, Any] | BadRecord]:
    try:
        yield from table.to_pylist()
        return
    except (ValueError, OverflowError, NotImplementedError):
        pass  # a value that is no Unicode, or no date
    for index in range(table.num_rows):
        try:
            yield table.slice(index, 1).to_pylist()[0]
        except (ValueError, OverflowError, NotImplementedError) as error:
            yield BadRecord(path, before + index + 1, "a value that cannot be read", detail=f"({_first_line(error)})")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
