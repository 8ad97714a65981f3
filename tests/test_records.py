"""Records and their JSON Lines form."""

from __future__ import annotations

from pathlib import Path

import pytest

from drama_dist.records import (
    BadRecord,
    Example,
    Passage,
    RepeatedKeys,
    invalid_utf8,
    parse_json_lines,
    read_json_lines,
    read_records,
    write_records,
)


def test_examples_survive_a_round_trip(tmp_path: Path) -> None:
    rows = [Example("größe?", ("a", "b"), ("c",), "crop", "de", {"seed": 1}), Example("x", ("a",), (), "synthetic")]
    assert write_records(tmp_path / "e.jsonl", rows) == 2
    assert read_records(tmp_path / "e.jsonl", Example.from_json) == rows
    assert [path.name for path in tmp_path.iterdir()] == ["e.jsonl"]


def test_the_title_comes_before_the_text() -> None:
    assert Passage("1", "text", "Title").content == "Title text"
    assert Passage("1", "text").content == "text"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"\xff\xfe{}", "invalid UTF-8 at byte 0"),
        (b"{'a': 1}", "not JSON"),
        (b"[1, 2]", "expected a JSON object"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(b'{"a": 1}\n\n' + line + b'\n{"a": 2}\n')
    with open(path, "rb") as file:
        values = dict(parse_json_lines(path, file))
    assert values[1] == {"a": 1} and values[4] == {"a": 2} and list(values) == [1, 3, 4]
    with pytest.raises(BadRecord, match=rf"f.jsonl:3: {reason}"):
        list(read_json_lines(path))


def test_unexpected_fields_are_named(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"id": "1", "text": "t"}\n{"id": "2", "body": "t"}\n', "utf-8")
    with pytest.raises(BadRecord, match=r"p.jsonl:2: unexpected fields"):
        read_records(tmp_path / "p.jsonl", lambda value: Passage(**value))


def test_keys_that_are_there_twice_are_told_and_those_of_inner_objects_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "f.jsonl").write_text('{"a": 1, "b": {"c": 1, "c": 2}, "a": 3}\n{"b": {"c": 1, "c": 2}}\n', "utf-8")
    (_, twice), (_, once) = read_json_lines(tmp_path / "f.jsonl")
    assert isinstance(twice, RepeatedKeys) and twice.repeated == {"a"} and twice["a"] == 3
    assert not isinstance(once, RepeatedKeys)


@pytest.mark.parametrize(("raw", "at"), [(b"\xff", 0), ("größe ".encode() + b"\xe9t\xe9", 8), (b"a\xed\xa0\x80", 1)])
def test_bytes_that_are_no_utf8_are_found(raw: bytes, at: int) -> None:
    bad = invalid_utf8(Path("f"), 3, raw.decode("utf-8", "surrogateescape"))
    assert bad and str(bad).startswith(f"f:3: invalid UTF-8 at byte {at}: ")
    assert invalid_utf8(Path("f"), 3, "größe 水 \ud800 \u2028") is None
