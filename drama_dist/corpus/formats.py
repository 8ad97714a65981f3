"""Files of records, in the forms that people have them in, as rows: JSON Lines, JSON, CSV, TSV, parquet, datasets.

Gzip is unpacked, and UTF-16 is read where a byte order mark says so. What a file is, its beginning decides, and its
name where that is open. Does not know what the columns mean: read.py and judgements.py do.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal

from drama_dist.corpus.json_text import is_one_json_text, json_objects
from drama_dist.records import LONGEST_RECORD, BadRecord, RepeatedKeys, invalid_utf8, parse_json_lines
from drama_dist.run.progress import say

Row = tuple[int, dict[str, Any] | BadRecord]  # and its line, or its number where the file has no lines
Form = Literal["json lines", "json", "csv", "tsv", "parquet", "text"]
SUFFIXES = (".jsonl", ".ndjson", ".json", ".tsv", ".csv", ".parquet")  # of files with rows; .gz may follow

_HEAD = 2**20  # bytes that show what a file is
_FIRST_LINES = 20  # decide together, because any one may be damaged
_ROWS_AT_ONCE = 1024
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

    names: others may be left out. bare: what the columns of a TSV file without a header are, where it has as many.
    remedy: what to do where there is no column of these names.
    """

    names: frozenset[str]
    bare: tuple[str, ...] | None
    remedy: str

    @cached_property
    def _by_small_letters(self) -> dict[str, str]:
        return {name.lower(): name for name in sorted(self.names)}

    def renamed(self, found: Sequence[str]) -> list[str]:
        """The names found, as they are wanted: capitals and blanks around do not count where no name is the same."""
        same = self.names.intersection(found)
        wanted = [self._by_small_letters.get(name.strip().lower(), name) for name in found]
        return [name if name in same or want in same else want for name, want in zip(found, wanted, strict=True)]

    def of_table(self, path: Path, found: Sequence[str]) -> list[str]:
        """`renamed` for the header of a file; raises ValueError if two columns have one of the names."""
        names = self.renamed(found)
        if twice := next((name for name in names if name in self.names and names.count(name) > 1), None):
            raise ValueError(f"{path}: two columns are called {twice!r}; rename one")
        return names

    def of_object(self, path: Path, line: int, value: dict[str, Any]) -> dict[str, Any] | BadRecord:
        """A JSON object with its keys `renamed`; a BadRecord if a wanted key is there twice."""
        names = self.renamed(list(value))
        repeated = value.repeated if isinstance(value, RepeatedKeys) else frozenset()
        for key, name in zip(value, names, strict=True):
            if name in self.names and (key in repeated or names.count(name) > 1):
                return BadRecord(path, line, "a key is named twice", value, f"({name!r})")
        return dict(zip(names, value.values(), strict=True))

    def missing(self, path: Path, found: Iterable[str]) -> ValueError:
        """The error where no column has one of the names."""
        return ValueError(f"{path}: no column has a name that is known; it has {shown_names(found)}: {self.remedy}")


def suffix_of(path: Path) -> str:
    """The last part of a name in small letters, .gz left out: .jsonl of corpus.JSONL.gz."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


@contextmanager
def open_data(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading: unpacked, and text in UTF-8 without a byte order mark.

    Halves of UTF-16 characters become invalid UTF-8. Raises ValueError where the file is damaged.
    """
    with open(path, "rb") as packed:
        is_packed = packed.read(2) == b"\x1f\x8b"
        packed.seek(0)
        file: BinaryIO = gzip.GzipFile(fileobj=packed) if is_packed else packed  # type: ignore[assignment]
        try:
            head = file.read(_HEAD)
            file.seek(len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0)
            encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if head.startswith(mark)), None)
            if encoding and b"\0" in head:  # as every blank and line break has; else it is a damaged line of UTF-8
                file.seek(0)
                text = file.read().decode(encoding, "surrogatepass")
                yield io.BytesIO(text.encode("utf-8", "surrogatepass"))
            else:
                yield file
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: a damaged gzip file ({error}); make or fetch it again") from None
        except UnicodeDecodeError as error:
            problem = f"damaged {error.encoding.upper()} at byte {error.start}"
            raise ValueError(f"{path}: {problem}; save it in UTF-8, or fetch it again") from None


def form_of(path: Path) -> Form:
    """What kind of file it is; "text" where it is none of the others. Raises ValueError for what holds no rows."""
    with open_data(path) as file:
        head = file.read(_HEAD)
    if head.startswith(b"PAR1"):
        return "parquet"
    begins = head.lstrip()
    if seen := next((what for magic, what in _NOT_ROWS.items() if begins[:40].lower().startswith(magic.lower())), None):
        raise ValueError(f"{path}: seems to be {seen}")
    nulls = sorted((head[::2].count(0), head[1::2].count(0)))
    if 4 * nulls[1] > len(head) and nulls[1] > 4 * nulls[0]:  # the other halves of Latin letters; damage has both
        raise ValueError(f"{path}: seems to be UTF-16 without a byte order mark, or no text; save it in UTF-8")
    suffix = suffix_of(path)
    is_table = suffix in (".csv", ".tsv")
    if suffix in (".jsonl", ".ndjson", ".json") or (begins.startswith((b"{", b"[")) and not is_table):
        return "json" if is_one_json_text(begins) else "json lines"
    if suffix in (".csv", ".parquet"):
        return "csv" if is_table else "parquet"
    first = begins.split(b"\n", _FIRST_LINES)[:_FIRST_LINES]
    return "tsv" if 2 * sum(b"\t" in line for line in first) > len(first) - first.count(b"") else "text"


def read_rows(path: Path, columns: Columns) -> Iterator[Row]:
    """Yield the rows of a file; of parquet with None in columns that are not wanted.

    Raises ValueError naming the file where it is of another form, has none of the columns, or is damaged.
    """
    form = form_of(path)
    if form == "text":
        seems = "seems to be plain text" if path.stat().st_size else "is empty"
        raise ValueError(f"{path}: {seems}: expected JSON Lines, JSON, CSV, TSV or parquet")
    with open_data(path) as file:
        if form in ("json lines", "json"):
            objects = parse_json_lines(path, file) if form == "json lines" else json_objects(path, file)
            for line, value in objects:
                yield line, value if isinstance(value, BadRecord) else columns.of_object(path, line, value)
        elif form == "parquet":
            yield from _parquet_rows(path, file, columns)
        else:
            yield from _table_rows(path, file, form, columns)


def text_lines(file: BinaryIO) -> list[str]:
    """The lines with their ends; bytes that are no UTF-8 are kept as lone surrogates, which `invalid_utf8` finds."""
    return [raw.decode("utf-8", "surrogateescape") for raw in file]


def open_dataset(folder: Path) -> Any:
    """Open a datasets.Dataset or DatasetDict on disk; raises ValueError naming the folder."""
    from datasets import load_from_disk

    try:
        return load_from_disk(str(folder))
    except Exception as error:  # which types the library raises changes between versions
        raise ValueError(f"{folder}: not a dataset that can be opened ({_first_line(error)})") from None


def dataset_rows(folder: Path, rows: Any, columns: Columns) -> Iterator[Row]:
    """Yield the rows of a datasets.Dataset, with None in columns that are not wanted."""
    names = columns.of_table(folder, rows.column_names)
    wanted = {found: name for found, name in zip(rows.column_names, names, strict=True) if name in columns.names}
    if not wanted:
        raise columns.missing(folder, names)
    tables = rows.select_columns(list(wanted)).with_format("arrow").iter(batch_size=_ROWS_AT_ONCE)
    yield from _arrow_rows(folder, tables, names, wanted)


def _table_rows(path: Path, file: BinaryIO, form: Form, columns: Columns) -> Iterator[Row]:
    """Rows under the names of the header, or under columns.bare."""
    lines = text_lines(file)
    header: Sequence[str] | None = None
    unquote = form == "tsv"
    for line, cells in _csv_cells(path, lines) if form == "csv" else _tsv_cells(path, lines):
        if isinstance(cells, BadRecord):
            yield line, cells
            continue
        if header is None:
            header = columns.of_table(path, [unquoted(cell.strip()) for cell in cells])
            if columns.names.intersection(header):
                continue
            if form == "csv" or not columns.bare or not _have_columns(lines, len(columns.bare)):
                raise columns.missing(path, cells)
            header, unquote = columns.bare, False
            shown = f"{', '.join(header[:-1])} and {header[-1]}"
            say(f"{path}: its first line names no known column; its columns are read as {shown}")
        if len(cells) != len(header):
            yield line, BadRecord(path, line, f"expected {len(header)} columns", cells, f"and found {len(cells)}")
        elif unquote and any(map(_is_open, cells)):
            yield line, BadRecord(path, line, "a quote that is not closed on its line", cells, "(line breaks need CSV)")
        else:
            yield line, dict(zip(header, map(unquoted, cells) if unquote else cells, strict=True))


def _have_columns(lines: Sequence[str], count: int) -> bool:
    """Whether most of the first lines have so many columns: one of them may be damaged."""
    first = [line.count("\t") == count - 1 for line in lines[:_FIRST_LINES] if line.strip()]
    return 2 * sum(first) > len(first)


def shown_names(names: Iterable[str]) -> str:
    """The first few names, for a message."""
    all_names = [repr(name)[1:-1][:40] for name in names]
    return ", ".join(all_names[:8]) + (", ..." if len(all_names) > 8 else "") if all_names else "none"


def _tsv_cells(path: Path, lines: Sequence[str]) -> Iterator[tuple[int, list[str] | BadRecord]]:
    for line, text in enumerate(lines, 1):
        if text.strip():
            yield line, invalid_utf8(path, line, text) or text.rstrip("\r\n").split("\t")


def _csv_cells(path: Path, lines: Sequence[str]) -> Iterator[tuple[int, list[str] | BadRecord]]:
    """A row that cannot be read ends with its first line."""
    first = next((line for line in lines if line.strip()), "")
    delimiter = max(",;\t", key=first.count)
    csv.field_size_limit(LONGEST_RECORD)  # in characters; it also ends a quote that is never closed
    start = 0
    while start < len(lines):
        number = start + 1
        reader = csv.reader(map(lines.__getitem__, range(start, len(lines))), delimiter=delimiter, strict=True)
        try:
            cells = next(reader)
        except csv.Error as error:
            opened = " in the row that begins here" if reader.line_num > 1 else ""
            yield number, BadRecord(path, number, "not CSV", lines[start], f"({error}{opened})")
            start += 1
            continue
        raw = "".join(lines[start : start + reader.line_num])
        start += reader.line_num
        if any(cell.strip() for cell in cells):
            yield number, invalid_utf8(path, number, raw) or cells


def unquoted(cell: str) -> str:
    """A cell without the quotes that spreadsheets put around it; as it is where a quote in it is not doubled."""
    inner = cell[1:-1]
    quoted = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if quoted else cell


def _is_open(cell: str) -> bool:
    """Whether it begins with a quote that no other closes."""
    return cell.startswith('"') and '"' not in cell[1:].replace('""', "")


def _parquet_rows(path: Path, file: BinaryIO, columns: Columns) -> Iterator[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(file)
        found = table.schema_arrow.names
        names = columns.of_table(path, found)
        wanted = {old: name for old, name in zip(found, names, strict=True) if name in columns.names}
        if wanted:
            yield from _arrow_rows(path, table.iter_batches(_ROWS_AT_ONCE, columns=list(wanted)), names, wanted)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{path}: a damaged parquet file ({_first_line(error)})") from None
    if not wanted:
        raise columns.missing(path, names)


def _arrow_rows(path: Path, tables: Iterable[Any], names: Sequence[str], wanted: dict[str, str]) -> Iterator[Row]:
    """Rows of Arrow tables, with None for names of which the tables have no column; wanted: the names of the others."""
    number = 0
    for table in tables:
        for row in _as_dicts(path, number, table):
            number += 1
            if not isinstance(row, BadRecord):
                row = {**dict.fromkeys(names), **{wanted[name]: value for name, value in row.items()}}
            yield number, row


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
