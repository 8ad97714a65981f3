"""Every form of file that is read, with where its bad rows are, and what is said of files that hold no rows."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Dataset
from pyarrow import parquet

from drama_dist.corpus.formats import Columns, dataset_rows, form_of, open_dataset, read_rows
from drama_dist.records import BadRecord

COLUMNS = Columns(frozenset(["_id", "id", "text", "title"]), ("_id", "text"), "name one")
ROWS: list[dict[str, Any]] = [
    {"id": "a", "text": 'He said "no", twice.'},
    {"id": "b", "text": "größe 水"},
    {"id": "c", "text": "[1]"},
]


def table(delimiter: str, quoting: Any = csv.QUOTE_MINIMAL) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, ["id", "text"], delimiter=delimiter, quoting=quoting, lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue().encode()


def packed_parquet() -> bytes:
    out = io.BytesIO()
    columns = {"id": [row["id"] for row in ROWS], "text": [row["text"].encode() for row in ROWS]}
    parquet.write_table(pa.table({**columns, "vector": [[0.5]] * 3}), out)
    return out.getvalue()


LINES = "\n".join(map(json.dumps, ROWS))
FORMS = {
    "a.jsonl": LINES.encode(),
    "mark.jsonl": b"\xef\xbb\xbf" + LINES.replace("\n", "\r\n\r\n").encode(),
    "no-suffix": LINES.encode(),
    "utf16.jsonl": LINES.encode("utf-16"),
    "utf32.jsonl": LINES.encode("utf-32"),
    "array.json": json.dumps(ROWS).encode(),
    "array.jsonl": json.dumps(ROWS, indent=2).encode(),
    "a-line-each.json": f"[\n{LINES}\n]".replace("\n{", ",\n{").replace("[,", "[").encode(),
    "indented.json": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    "a.tsv": table("\t"),
    "unquoted.tsv": ("ID\tText\n" + "".join(f"{row['id']}\t{row['text']}\n" for row in ROWS)).encode(),
    "a.txt": table("\t"),
    "a.csv": table(","),
    "all-quoted.csv": table(",", csv.QUOTE_ALL),
    "semicolons.csv": table(";"),
    "a.parquet": packed_parquet(),
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_rows(tmp_path: Path, name: str, packed: bool) -> None:
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(FORMS[name]) if packed else FORMS[name])
    rows = [value for _, value in read_rows(path, COLUMNS)]
    texts = [
        {key: row[key].decode() if isinstance(row[key], bytes) else row[key] for key in ("id", "text")} for row in rows
    ]
    assert texts == ROWS


def test_two_columns_without_a_header_are_id_and_text_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "collection.tsv").write_text('0\t"Quoted," he said\n1\t"All of it"\n2\n', "utf-8")
    *rows, (line, bad) = read_rows(tmp_path / "collection.tsv", COLUMNS)
    assert rows == [(1, {"_id": "0", "text": '"Quoted," he said'}), (2, {"_id": "1", "text": '"All of it"'})]
    assert line == 3 and isinstance(bad, BadRecord) and bad.problem == "expected 2 columns and found 1"
    assert "its columns are read as _id and text" in capsys.readouterr().err


@pytest.mark.parametrize("first", ["", "\t", "1", "1\t2\t3", "no tab", "\xff"])
def test_a_bad_first_line_of_a_file_without_header_is_one_bad_row(tmp_path: Path, first: str) -> None:
    (tmp_path / "c.txt").write_bytes(
        first.encode("latin-1") + b"\n" + b"".join(b"%d\tsome text\n" % n for n in range(5))
    )
    rows = [value for _, value in read_rows(tmp_path / "c.txt", COLUMNS) if isinstance(value, dict)]
    assert rows == [{"_id": str(n), "text": "some text"} for n in range(5)]


@pytest.mark.parametrize(
    ("name", "content", "bad"),
    [
        ("a.jsonl", b'{"id": "a"}\n{"id": \n{"id": "b"}', {2: "not JSON"}),
        ("a.json", b'[\n {"id": "a"},\n {"id": },\n {"id": "b"}\n]', {3: "not JSON"}),
        ("a.json", b'[\n {"id": "a"},\n {"id": ' + b"[" * 10**5 + b'},\n {"id": "b"}]', {3: "nested too deeply"}),
        ("a.json", b'[\n {"id": "a"},\n {"id": "b"},\n {"id":\n}\n]', {4: "not JSON"}),
        ("a.json", b'[{"id": "a"}, 7,\n{"id": "b"}]', {1: "expected a JSON object"}),
        ("a.tsv", b"id\ttext\na\tx\nb\na\xff\tx\nb\ty", {3: "expected 2 columns", 4: "invalid UTF-8"}),
        ("a.csv", b'id,text\na,"x\ny"\nb,"open\nb,c,d\nb,y', {4: "not CSV", 5: "expected 2 columns"}),
    ],
    ids=["json lines", "json", "json too deep", "json at the end", "json of another type", "tsv", "csv"],
)
def test_a_bad_row_is_named_and_those_around_it_are_read(
    tmp_path: Path, name: str, content: bytes, bad: dict[int, str]
) -> None:
    (tmp_path / name).write_bytes(content)
    rows = list(read_rows(tmp_path / name, COLUMNS))
    assert [value["id"] for _, value in rows if isinstance(value, dict)] == ["a", "b"]
    assert {line: value.reason for line, value in rows if isinstance(value, BadRecord)} == bad


def test_json_of_which_the_rest_cannot_be_read_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_bytes(json.dumps(ROWS, indent=1).encode()[:-30])
    with pytest.raises(ValueError, match=r"cut.json:10: not JSON .*nothing after it can be read$"):
        list(read_rows(tmp_path / "cut.json", COLUMNS))


@pytest.mark.parametrize("first", [b"[1, 2]", b'[{"id": "x"}', b"[", b"<html>", b"\xff\xfe{}", b"\x00\x00", b'{"id":'])
def test_a_bad_first_line_does_not_change_what_the_file_is(tmp_path: Path, first: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(first + b"\n" + LINES.encode())
    if first == b"<html>":
        with pytest.raises(ValueError, match=r"a.jsonl: seems to be HTML"):
            form_of(tmp_path / "a.jsonl")
        return
    rows = [value for _, value in read_rows(tmp_path / "a.jsonl", COLUMNS)]
    assert isinstance(rows[0], BadRecord) and rows[1:] == ROWS


@pytest.mark.parametrize(
    ("content", "seems"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 9\n", "a git LFS pointer .* `git lfs pull`"),
        (b"\n<!DOCTYPE html><title>404</title>", "HTML"),
        (b'<?xml version="1.0"?>', "XML"),
        (b"PK\x03\x04abc", "a zip archive: unpack it"),
        (b"BZh91AY", "packed with bzip2"),
        ("{'id': 1}".encode("utf-16-le"), "UTF-16 without a byte order mark"),
        (b"Once upon a time\nthere was", "plain text"),
    ],
    ids=["git lfs", "html", "xml", "zip", "bzip2", "utf-16", "prose"],
)
def test_a_file_without_rows_is_named_with_what_it_seems_to_be(tmp_path: Path, content: bytes, seems: str) -> None:
    (tmp_path / "c.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"^{tmp_path}/c.txt: seems to be {seems}"):
        list(read_rows(tmp_path / "c.txt", COLUMNS))


@pytest.mark.parametrize("content", [gzip.compress(b"x" * 999)[:-5], b"\x1f\x8bno", b"PAR1 but nothing else"])
def test_a_damaged_file_is_named_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/c.jsonl: a damaged (gzip|parquet) file") as raised:
        list(read_rows(tmp_path / "c.jsonl", COLUMNS))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.parquet", "dataset"])
def test_columns_of_other_names_are_named(tmp_path: Path, name: str) -> None:
    path, others = tmp_path / name, {"key": ["1"], "words": ["x"], "more": ["y"]}
    if name == "dataset":
        Dataset.from_dict(others).save_to_disk(str(path))
    elif name == "a.parquet":
        parquet.write_table(pa.table(others), path)
    else:
        path.write_text("key,words,more\n1,x,y\n".replace(",", "\t" if name == "a.tsv" else ","), "utf-8")
    with pytest.raises(ValueError, match="no column has a name that is known; it has key, words, more: name one"):
        list(dataset_rows(path, open_dataset(path), COLUMNS) if path.is_dir() else read_rows(path, COLUMNS))


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text,Text\na,b,c\n", "utf-8")
    with pytest.raises(ValueError, match=r"a.csv:1: two columns are called 'text'"):
        list(read_rows(tmp_path / "a.csv", COLUMNS))


def test_a_value_of_parquet_that_is_no_text_is_one_bad_row(tmp_path: Path) -> None:
    invalid = pa.Array.from_buffers(pa.string(), 3, [None, *pa.array([b"ok", b"\xff", b"ok"]).buffers()[1:]])
    parquet.write_table(pa.table({"id": ["a", "b", "c"], "text": invalid}), tmp_path / "a.parquet")
    rows = [value for _, value in read_rows(tmp_path / "a.parquet", COLUMNS)]
    assert isinstance(rows[1], BadRecord) and rows[1].line == 2 and rows[0] == {"id": "a", "text": "ok"}


def test_a_folder_that_is_no_dataset_is_named(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "d"))
    next((tmp_path / "d").glob("*.arrow")).write_bytes(b"ARROW")
    with pytest.raises(ValueError, match=rf"^{tmp_path}/d: not a dataset that can be opened \(") as raised:
        open_dataset(tmp_path / "d")
    assert "\n" not in str(raised.value)
