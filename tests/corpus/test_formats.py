"""Every form of file that is read, with where its bad rows are, and what is said of files that hold no rows."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tracemalloc
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


def packed_parquet(id: str = "id", text: str = "text") -> bytes:
    out = io.BytesIO()
    columns = {id: [row["id"] for row in ROWS], text: [row["text"].encode() for row in ROWS]}
    parquet.write_table(pa.table({**columns, "vector": [[0.5]] * 3}), out)
    return out.getvalue()


OPEN_QUOTE = "a quote that is not closed on its line"
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
    "two-arrays.json": f"{json.dumps(ROWS[:1])}\n{json.dumps(ROWS[1:])}\n".encode(),
    "two-indented-arrays.json": f"{json.dumps(ROWS[:1], indent=2)}\n{json.dumps(ROWS[1:], indent=2)}".encode(),
    "array-a-line.jsonl": "\n".join(json.dumps([row]) for row in ROWS).encode(),
    "array-then-object.json": f"{json.dumps(ROWS[:2])},\n{json.dumps(ROWS[2])}".encode(),
    "capitals.json": json.dumps([{"Id": row["id"], "TEXT": row["text"]} for row in ROWS]).encode(),
    "indented.json": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    "a.tsv": table("\t"),
    "unquoted.tsv": ("ID\tText\n" + "".join(f"{row['id']}\t{row['text']}\n" for row in ROWS)).encode(),
    "a.txt": table("\t"),
    "a.csv": table(","),
    "all-quoted.csv": table(",", csv.QUOTE_ALL),
    "semicolons.csv": table(";"),
    "a.parquet": packed_parquet(),
    "capitals.parquet": packed_parquet("ID", "Text"),
}


def test_arrays_in_a_gzip_file_of_several_parts_are_all_read(tmp_path: Path) -> None:
    parts = [gzip.compress(json.dumps([row]).encode()) for row in ROWS]
    (tmp_path / "a.json.gz").write_bytes(b"".join(parts))
    assert [value for _, value in read_rows(tmp_path / "a.json.gz", COLUMNS)] == ROWS


def test_a_dataset_with_capital_names_is_read(tmp_path: Path) -> None:
    Dataset.from_list([{"ID": row["id"], "Text": row["text"]} for row in ROWS]).save_to_disk(str(tmp_path / "d"))
    rows = [value for _, value in dataset_rows(tmp_path / "d", open_dataset(tmp_path / "d"), COLUMNS)]
    assert rows == ROWS


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
        ("a.json", b'[{"id": "a"},\n{"id": },\n{"id": "b"}]', {2: "not JSON"}),
        ("a.json", b'[{"id": },\n{"id": "a"},\n{"id": "b"}]', {1: "not JSON"}),
        ("a.json", b'[\n{"id": },\n{"id": "a"},\n{"id": "b"}\n]', {2: "not JSON"}),
        ("a.json", b'[\n  {\n    "id": \n  },\n  {\n    "id": "a"\n  },\n  {"id": "b"}\n]', {2: "not JSON"}),
        ("a.json", b'{\n  "id": \n}\n{\n  "id": "a"\n}\n{\n  "id": "b"\n}', {1: "not JSON"}),
        ("a.json", b'{\n  "id": "a"\n}\n{\n  "id": "b"\n}\n{\n  "id": \n}', {7: "not JSON"}),
        ("a.json", b'[\n  {\n    "id": "a"\n  },\n  {\n    "id": \n  {\n    "id": "b"\n  }\n]', {5: "not JSON"}),
        ("a.json", b'[{"id": "a"}\n,{"id": }\n,{"id": "b"}\n]', {2: "not JSON"}),
        ("a.json", b'[\n {"id": "a"},\n {"id":\n }\n]\n[{"id": "b"}]', {3: "not JSON"}),
        ("a.json", b'[{"id": "a"}]\n7 [{"id": "b"}]', {2: "expected a JSON object"}),
        ("a.json", b'[{"id": "a"},\n{"id": "b"}]\n}', {3: "not JSON"}),
        ("a.json", b'[null, [{"id": "a"}], {"id": "b"}]', {1: "expected a JSON object"}),
        ("a.json", b'[{"id": "a"},\n{"id": "c", "text": "\xe9"},\n{"id": "b"}]', {2: "invalid UTF-8"}),
        ("a.json", b'[{"id": "a"}, {"id": "c", "text": "\xe9"}, {"id": "b"}]', {1: "invalid UTF-8"}),
        ("a.json", b'[\n {"id": "' + b"c" * 2**21 + b'", },\n {"id": "a"},\n {"id": "b"}\n]', {2: "not JSON"}),
        ("a.csv", b'id,text\na,"x\ny"\nc,"o\n\xff\nd,e"\nb,y', {4: "invalid UTF-8"}),
        ("a.tsv", b'id\ttext\na\tx\nc\t"first\nsecond ""q"""\nb\ty', {3: OPEN_QUOTE, 4: "expected 2 columns"}),
        ("a.tsv", b"id\ttext\na\tx\nb\na\xff\tx\nb\ty", {3: "expected 2 columns", 4: "invalid UTF-8"}),
        ("a.csv", b'id,text\na,"x\ny"\nb,"open\nb,c,d\nb,y', {4: "not CSV", 5: "expected 2 columns"}),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_bad_row_is_named_and_those_around_it_are_read(
    tmp_path: Path, name: str, content: bytes, bad: dict[int, str]
) -> None:
    (tmp_path / name).write_bytes(content)
    rows = list(read_rows(tmp_path / name, COLUMNS))
    assert [value["id"] for _, value in rows if isinstance(value, dict)] == ["a", "b"]
    assert {line: value.reason for line, value in rows if isinstance(value, BadRecord)} == bad


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (json.dumps(ROWS, indent=1).encode()[:-30], 10),
        (b'[{"id": "a"}] trailing', 1),
        (b'[{"id": "a"},\n{"id": "b", "text": "cut', 2),
        (b'[{"id": "a"}, {"id": }, {"id": "b"}]', 1),
        (b'[{"id": },{"id": "b"}]', 1),
        (b'[\n{\n"id": "a"\n},\n{\n"id":,\n"more": [\n{\n"id": "b"\n}\n]\n}\n]', 5),
        (b'[ {\n  "id" : \n}, {\n  "id" : "b"\n} ]', 1),
    ],
    ids=lambda value: str(value)[:60],
)
def test_json_of_which_the_rest_cannot_be_read_is_refused_with_its_line(
    tmp_path: Path, content: bytes, line: int
) -> None:
    (tmp_path / "cut.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"cut.json:{line}: not JSON .*nothing after it can be read$"):
        list(read_rows(tmp_path / "cut.json", COLUMNS))


def test_a_list_that_ends_between_objects_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cut.json").write_bytes(b'[\n {"id": "a"},\n {"id": "b"},\n')
    with pytest.raises(ValueError, match=r"cut.json:4: the list is not closed, so the file is cut"):
        list(read_rows(tmp_path / "cut.json", COLUMNS))


def test_a_first_object_beyond_the_head_is_read(tmp_path: Path) -> None:
    rows = [{"id": "a", "text": "x" * 2**21}, *ROWS[1:]]
    for indent in (None, 2):
        (tmp_path / "a.json").write_text(json.dumps(rows, indent=indent), "utf-8")
        assert [value for _, value in read_rows(tmp_path / "a.json", COLUMNS)] == rows


def test_the_time_for_json_grows_with_its_size_only(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"id": str(n), "text": "x" * 900} for n in range(4000)]), "utf-8")
    tracemalloc.start()
    rows = read_rows(tmp_path / "a.json", COLUMNS)
    next(rows)
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    assert sum(1 for _ in rows) == 3999
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - before < 100_000  # no copy of the rest of the file for each object


@pytest.mark.parametrize("lines", [1500, 20_000])
def test_a_quoted_field_of_many_lines_is_one_row(tmp_path: Path, lines: int) -> None:
    text = "\n".join(f"line {n}, of it" for n in range(lines))
    (tmp_path / "a.csv").write_text(f'id,text\na,"{text}"\nb,y\n', "utf-8")
    assert list(read_rows(tmp_path / "a.csv", COLUMNS)) == [
        (2, {"id": "a", "text": text}),
        (lines + 2, {"id": "b", "text": "y"}),
    ]


def test_a_quote_that_is_not_closed_in_16_mib_takes_one_line(tmp_path: Path) -> None:
    rest = "".join(f"b{n},{'y' * 2**20}\n" for n in range(17))
    (tmp_path / "a.csv").write_text(f'id,text\na,"open\n{rest}c,"z"\n', "utf-8")
    (line, bad), *rows = read_rows(tmp_path / "a.csv", COLUMNS)
    assert line == 2 and isinstance(bad, BadRecord) and bad.reason == "not CSV"
    assert "field limit (16777216) in the row that begins here" in bad.detail
    assert [value["id"] for _, value in rows if isinstance(value, dict)] == [*(f"b{n}" for n in range(17)), "c"]


@pytest.mark.parametrize("damage", ["half", "cut"])
def test_damaged_utf16_is_set_aside_or_refused(tmp_path: Path, damage: str) -> None:
    good = LINES.encode("utf-16")
    half = '\n{"id": "x", "text": "'.encode("utf-16-le") + b"\x00\xd8" + '"}'.encode("utf-16-le")
    (tmp_path / "a.jsonl").write_bytes(good + half if damage == "half" else good[:-1])
    if damage == "cut":
        with pytest.raises(ValueError, match=r"a.jsonl: damaged UTF-16-LE at byte \d+; save it in UTF-8"):
            list(read_rows(tmp_path / "a.jsonl", COLUMNS))
        return
    *rows, (line, bad) = read_rows(tmp_path / "a.jsonl", COLUMNS)
    assert [value for _, value in rows] == ROWS
    assert line == 4 and isinstance(bad, BadRecord) and bad.reason == "invalid UTF-8"


def test_nulls_in_one_line_do_not_make_a_file_utf16(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\0" * 60 + b"\n" + LINES.encode())
    (_, bad), *rows = read_rows(tmp_path / "a.jsonl", COLUMNS)
    assert isinstance(bad, BadRecord) and [value for _, value in rows] == ROWS


def test_brackets_do_not_make_a_table_json(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("[1]\tone text\n{2}\ttwo texts\n", "utf-8")
    assert [value for _, value in read_rows(tmp_path / "a.tsv", COLUMNS)] == [
        {"_id": "[1]", "text": "one text"},
        {"_id": "{2}", "text": "two texts"},
    ]
    (tmp_path / "a.csv").write_text("{note},id,text\n,a,x\n", "utf-8")
    assert [value for _, value in read_rows(tmp_path / "a.csv", COLUMNS)] == [{"{note}": "", "id": "a", "text": "x"}]


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
        ("{'id': 1}".encode("utf-16-be"), "UTF-16 without a byte order mark"),
        (b"Once upon a time\nthere was", "plain text"),
    ],
    ids=["git lfs", "html", "xml", "zip", "bzip2", "utf-16", "utf-16 be", "prose"],
)
def test_a_file_without_rows_is_named_with_what_it_seems_to_be(tmp_path: Path, content: bytes, seems: str) -> None:
    (tmp_path / "c.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"^{tmp_path}/c.txt: seems to be {seems}"):
        list(read_rows(tmp_path / "c.txt", COLUMNS))


@pytest.mark.parametrize("content", [gzip.compress(b"x" * 999, mtime=0)[:-5], b"\x1f\x8bno", b"PAR1 but nothing else"])
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


@pytest.mark.parametrize("names", [["id", "text", "text"], ["id", "Text", "TEXT"]], ids=str)
@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_two_columns_of_one_name_are_refused(tmp_path: Path, name: str, names: list[str]) -> None:
    path = tmp_path / name
    if name == "a.csv":
        path.write_text(",".join(names) + "\na,b,c\n", "utf-8")
    else:
        parquet.write_table(pa.table([pa.array(["a"])] * 3, names=names), path)
    with pytest.raises(ValueError, match=rf"{name}: two columns are called 'text'"):
        list(read_rows(path, COLUMNS))


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_the_column_of_exactly_the_name_is_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.csv":
        path.write_text("Text,id,text\nc,a,b\n", "utf-8")
    else:
        parquet.write_table(pa.table({"Text": ["c"], "id": ["a"], "text": ["b"]}), path)
    ((_, row),) = read_rows(path, COLUMNS)
    assert isinstance(row, dict) and (row["id"], row["text"]) == ("a", "b")


@pytest.mark.parametrize(
    ("name", "problem"), [("a.parquet", "a damaged parquet file"), ("a.tsv", "is empty"), ("a", "is empty")]
)
def test_an_empty_file_is_not_called_text(tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"^{tmp_path}/{name}: {problem}"):
        list(read_rows(tmp_path / name, COLUMNS))


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
