"""Records and their JSON Lines form."""

from __future__ import annotations

from pathlib import Path

import pytest

from drama_dist.records import (
    BadRecord,
    Example,
    Passage,
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
