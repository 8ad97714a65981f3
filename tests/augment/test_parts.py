"""Work in parts: finished parts are read back, missing ones are done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from drama_dist.augment.parts import in_parts


def test_finished_parts_are_not_done_again(tmp_path: Path) -> None:
    done: list[int] = []

    def work(index: int, items: Sequence[int]) -> list[dict[str, int]]:
        done.append(index)
        return [{"value": item * item} for item in items]

    first = in_parts(tmp_path / "squares", range(7), 3, "items", work)
    assert [row["value"] for row in first] == [0, 1, 4, 9, 16, 25, 36] and done == [0, 1, 2]
    (tmp_path / "squares" / "part-00001.jsonl").unlink()
    assert in_parts(tmp_path / "squares", range(7), 3, "items", work) == first and done == [0, 1, 2, 1]


def test_a_part_that_is_damaged_is_done_again(tmp_path: Path) -> None:
    done: list[int] = []

    def work(index: int, items: Sequence[int]) -> list[dict[str, int]]:
        done.append(index)
        return [{"value": item * item} for item in items]

    first = in_parts(tmp_path / "squares", range(7), 3, "items", work)
    path = tmp_path / "squares" / "part-00001.jsonl"
    for damaged in (path.read_bytes().replace(b"16", b"17"), path.read_bytes()[:-8], b""):
        done.clear()
        path.write_bytes(damaged)
        assert in_parts(tmp_path / "squares", range(7), 3, "items", work) == first and done == [1]
