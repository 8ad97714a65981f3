"""Joining records: which become one passage, what it has of each, where judgements go, which stages do it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drama_dist.corpus.collection import open_collection
from drama_dist.corpus.join import joined, moved
from drama_dist.corpus.read import RawCorpus, SetAside, read_corpus
from drama_dist.records import Passage
from drama_dist.run.folder import OtherSettings
from drama_dist.run.runner import make
from drama_dist.settings import CorpusSettings, Settings, SettingsError


def read(path: Path, **settings: Any) -> RawCorpus:
    return read_corpus(path, CorpusSettings(path=str(path), **settings), SetAside())


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


ROWS = [
    {"_id": "a0", "title": "Apple", "text": "An apple is a fruit.", "page": 1},
    {"_id": "b0", "title": "Bridge", "text": "A bridge spans a river.", "page": 2},
    {"_id": "a1", "title": "Apple", "text": "Apples grow on trees.", "page": 1},
    {"_id": "n0", "text": "A text without a title."},
    {"_id": "n1", "title": "", "text": "Another one without a title."},
    {"_id": "a2", "title": "Apple", "text": "Most are red.", "language": "de", "page": 2},
]


def beir(folder: Path) -> Path:
    lines(folder / "corpus.jsonl", ROWS)
    lines(folder / "queries.jsonl", [{"_id": "q0", "text": "where do apples grow"}, {"_id": "q1", "text": "bridges"}])
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq0\ta1\t2\nq0\ta0\t0\nq0\tn1\t1\nq1\tb0\t1\nq1\tgone\t1\n", "utf-8"
    )
    return folder


def test_records_with_one_title_are_one_passage_and_have_the_judgements_of_all(tmp_path: Path) -> None:
    raw = read(beir(tmp_path / "b"), join_by="title")
    assert [passage.id for passage in raw.passages] == ["a0", "b0", "n0", "n1"]
    assert raw.passages[0] == Passage(
        "a0", "An apple is a fruit.\n\nApples grow on trees.\n\nMost are red.", "Apple", "en"
    )
    assert raw.qrels == {"q0": {"a0": 2, "n1": 1}, "q1": {"b0": 1}}
    plain = read(tmp_path / "b")
    assert len(plain.passages) == 6 and plain.qrels["q0"] == {"a1": 2, "a0": 0, "n1": 1}


def test_any_key_can_say_what_belongs_together_a_number_too(tmp_path: Path) -> None:
    raw = read(lines(tmp_path / "c.jsonl", ROWS), join_by="page")
    assert {passage.id: passage.title for passage in raw.passages} == {
        "a0": "Apple",
        "b0": "Bridge",
        "n0": "",
        "n1": "",
    }
    assert raw.passages[1].text == "A bridge spans a river.\n\nApple Most are red."  # its own title comes along
    table = tmp_path / "t.tsv"
    table.write_text("docid\ttext\tpage\n1\tone\tx\n2\ttwo\ty\n3\tthree\tx\n", "utf-8")
    assert [passage.text for passage in read(table, join_by="page").passages] == ["one\n\nthree", "two"]


def test_records_without_ids_are_joined_too(tmp_path: Path) -> None:
    path = lines(
        tmp_path / "c.jsonl",
        [{"title": "T", "text": "one"}, {"title": "U", "text": "x"}, {"title": "T", "text": "two"}],
    )
    assert [(passage.id, passage.text) for passage in read(path, join_by="title").passages] == [
        ("row-1", "one\n\ntwo"),
        ("row-2", "x"),
    ]


def test_a_key_that_joins_nothing_is_an_error_in_the_corpus_and_a_line_elsewhere(
    tmp_path: Path, small_settings: Callable[..., Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    path = lines(tmp_path / "c.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"corpus.path=.*c.jsonl: corpus.join_by=titel joins nothing: no two of 6 rec"):
        read(path, join_by="titel")
    settings = CorpusSettings(path=str(path), join_by="titel")
    assert len(read_corpus(path, settings, SetAside(), "evaluate.collections").passages) == 6
    assert "corpus.join_by=titel joins nothing" in capsys.readouterr().err
    with pytest.raises(SettingsError, match=r"corpus.join_by=title is for records, which corpus.path=installed-pack"):
        small_settings("corpus.path=installed-packages", "corpus.packages=[numpy]", "corpus.join_by=title")


def test_a_passage_called_as_another_s_whole_is_not_joined_with_it() -> None:
    parts = [(Passage("x", "one"), ""), (Passage("y", "two"), "x"), (Passage("z", "three"), "x")]
    passages, whole_of = joined(parts)
    assert [passage.id for passage in passages] == ["x", "y"]
    assert whole_of == {"x": "x", "y": "y", "z": "y"}
    assert moved({"q": {"z": 1, "y": -1, "x": 3}}, whole_of) == {"q": {"y": 1, "x": 3}}


def test_the_run_s_corpus_and_other_collections_are_joined_and_windows_are_of_whole_passages(
    small_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    folder = beir(tmp_path / "b")
    named = (f"corpus.path={folder}", f"evaluate.collections=[{beir(tmp_path / 'c')}]", "corpus.min_words=0")
    cut = ("corpus.window_words=9", "corpus.window_step=8", "corpus.bad_record_limit=0.5")
    settings = small_settings(*named, *cut, "corpus.join_by=title")
    assert open_collection(make(settings, "corpus")).passages.ids == ["a0", "b0", "n0", "n1"]
    other = open_collection(make(settings, "corpus", collection="c"))
    assert other.qrels == {"q0": {"a0": 2, "n1": 1}, "q1": {"b0": 1}}
    windows = open_collection(make(settings, "corpus", collection="windows")).passages
    assert windows.ids[:2] == ["a0#0", "a0#1"] and windows[0].text == "An apple is a fruit.\n\nApples grow on"
    with pytest.raises(OtherSettings, match="join_by"):
        make(small_settings(*named, *cut), "corpus", collection="c")
