"""Work in parts: finished parts are read back, missing ones are done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from drama_dist.augment.parts import in_parts
from drama_dist.augment.sources.prompts import Message
from drama_dist.augment.writers.writer import Sampling, Writer
from drama_dist.run import progress


class Silent(Writer):
    name = "silent"

    def check(self, sampling: Sampling) -> None:
        return None

    def answer(self, conversations: Sequence[list[Message]], sampling: Sampling) -> list[str]:
        return [""] * len(conversations)


def test_finished_parts_are_not_done_again(tmp_path: Path) -> None:
    done: list[int] = []

    def work(index: int, items: Sequence[int]) -> list[dict[str, int]]:
        done.append(index)
        return [{"value": item * item} for item in items]

    first = in_parts(tmp_path / "squares", range(7), 3, "items", work)
    assert [row["value"] for row in first] == [0, 1, 4, 9, 16, 25, 36] and done == [0, 1, 2]
    (tmp_path / "squares" / "part-00001.jsonl").unlink()
    assert in_parts(tmp_path / "squares", range(7), 3, "items", work) == first and done == [0, 1, 2, 1]


def test_a_part_without_its_other_file_is_done_again(tmp_path: Path) -> None:
    done: list[int] = []

    def work(index: int, items: Sequence[int]) -> list[dict[str, int]]:
        done.append(index)
        beside(index).write_text(str(items), "utf-8")
        return [{"value": item} for item in items]

    def beside(index: int) -> Path:
        return tmp_path / f"{index}.txt"

    first = in_parts(tmp_path / "parts", range(7), 3, "items", work, also=beside)
    beside(0).unlink()
    beside(2).write_text("damaged", "utf-8")
    assert in_parts(tmp_path / "parts", range(7), 3, "items", work, also=beside) == first
    assert done == [0, 1, 2, 0, 2] and beside(2).read_text("utf-8") == "range(6, 7)"


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


def test_tokens_a_second_stand_beside_the_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 10**6, 6))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    writer = Silent()

    def work(index: int, items: Sequence[int]) -> list[dict[str, int]]:
        assert writer.on_tokens is not None
        for _ in range(5):
            writer.on_tokens(12)
        return [{"value": item} for item in items]

    in_parts(tmp_path / "parts", range(4), 2, "items", work, writer=writer)
    assert "2 tokens/s" in capsys.readouterr().err and writer.on_tokens is None


def test_other_ranks_count_tokens_and_show_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress.ranks, "rank", lambda: 1)
    rate = progress.TokenRate(progress.progress_bar(4, "augment", "queries"))
    monkeypatch.setattr(progress.time, "monotonic", lambda: 1e9)
    rate(5)
    assert capsys.readouterr().err == ""
