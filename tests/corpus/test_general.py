"""General text: read like a corpus, stored apart from it, and joined to it in the share that is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from drama_dist.corpus.collection import open_collection
from drama_dist.corpus.general import open_general, with_general, write_general
from drama_dist.records import Passage
from drama_dist.run.folder import OtherSettings
from drama_dist.run.runner import make
from drama_dist.settings import Settings, SettingsError


def passages(prefix: str, count: int) -> Iterator[Passage]:
    return (Passage(f"{prefix}{n}", f"text {n}") for n in range(count))


@pytest.mark.parametrize(("share", "joined"), [(0.2, 25), (0.5, 100), (0.8, 400), (0.001, 0)])
def test_general_passages_are_the_share_of_all(share: float, joined: int) -> None:
    read: list[str] = []

    def general() -> Iterator[Passage]:
        for passage in passages("g", 1000):
            read.append(passage.id)
            yield passage

    ids = [passage.id for passage in with_general(passages("o", 100), general(), share)]
    assert ids == [f"o{n}" for n in range(100)] + [f"g{n}" for n in range(joined)]
    assert len(read) == joined  # of a large text no more is read than joins


def test_too_little_general_text_is_taken_whole_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(list(with_general(passages("o", 100), passages("g", 20), 0.5))) == 120
    assert "corpus.general gives 20 passages of the 100 that corpus.general_share=0.5" in capsys.readouterr().err
    assert len(list(with_general(passages("o", 100), passages("g", 0), 0.5))) == 100
    assert "corpus.general" not in capsys.readouterr().err


def passages_of(folder: Path) -> list[Passage]:
    table = open_general(folder)
    assert table is not None
    return [table[position] for position in range(len(table))]


def texts(path: Path, rows: list[str]) -> Path:
    path.write_text("".join(json.dumps({"_id": f"{n}", "text": row}) + "\n" for n, row in enumerate(rows)), "utf-8")
    return path


def test_ids_differ_from_those_of_the_corpus(tmp_path: Path) -> None:
    write_general(tmp_path, passages("", 2), ["0", "general:0", "general::1"])
    assert [passage.id for passage in passages_of(tmp_path)] == ["general:::0", "general:::1"]


def test_text_that_the_corpus_has_already_is_no_general_text(
    small_settings: Callable[..., Settings], corpus_file: Path
) -> None:
    with pytest.raises(ValueError, match=r"corpus\.general=.*the corpus has all 64 passages"):
        make(small_settings(f"corpus.general={corpus_file}"), "corpus")


def test_the_corpus_stage_stores_it_apart(
    small_settings: Callable[..., Settings], corpus_file: Path, tmp_path: Path
) -> None:
    own = [json.loads(line)["text"] for line in corpus_file.read_text("utf-8").splitlines()]
    rows = [*(f"Another text altogether, which is number {n}." for n in range(30)), "tiny", own[3].upper()]
    file = texts(tmp_path / "general.jsonl", rows)
    plain = make(small_settings(f"run={tmp_path / 'plain'}"), "corpus")
    folder = make(small_settings(f"corpus.general={file}"), "corpus")
    assert list(open_collection(folder).passages.texts()) == list(open_collection(plain).passages.texts())
    general = passages_of(folder)
    assert {passage.id: passage.text for passage in general} == {f"general:{n}": rows[n] for n in range(30)}
    assert [passage.text for passage in general] != rows[:30]  # in an order drawn by the seed
    assert open_general(plain) is None
    other = make(small_settings(f"corpus.general={file}", "seed=2", f"run={tmp_path / 'other'}"), "corpus")
    assert [passage.id for passage in passages_of(other)] != [passage.id for passage in general]
    aside = [json.loads(line) for line in (folder / "set_aside.jsonl").read_text("utf-8").splitlines()]
    assert [row["reason"] for row in aside] == [
        "trivial: fewer words than corpus.min_words",
        f"duplicate of {json.loads(corpus_file.read_text('utf-8').splitlines()[3])['_id']}",
    ]
    file.write_text(file.read_text("utf-8") + "\n", "utf-8")
    with pytest.raises(OtherSettings, match="general source"):
        make(small_settings(f"corpus.general={file}"), "corpus")


def test_a_share_of_the_texts_to_train_on_is_general_and_none_is_searched(
    small_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    long = " ".join(f"word{n}" for n in range(300))
    file = texts(tmp_path / "general.jsonl", [f"{long} in the text of number {n}" for n in range(30)])
    settings = small_settings(f"corpus.general={file}", "corpus.general_share=0.36")
    trained = open_collection(make(settings, "corpus", collection="windows")).passages.ids
    assert [id.startswith("general:") for id in trained] == [False] * 64 + [True] * 36
    assert any(id.endswith("#2") for id in trained)  # of windows, too, these are the share
    assert not any(id.startswith("general:") for id in open_collection(make(settings, "corpus")).passages.ids)


def test_docs_of_packages_are_general_text_where_packages_are_named(small_settings: Callable[..., Settings]) -> None:
    with pytest.raises(
        SettingsError, match=r"corpus.general=installed-packages needs names in corpus.general_packages"
    ):
        small_settings("corpus.general=installed-packages")
    folder = make(small_settings("corpus.general=installed-packages", "corpus.general_packages=[yaml]"), "corpus")
    general = passages_of(folder)
    assert general and all(passage.id.startswith("general:yaml") for passage in general)


def test_general_text_that_is_not_there_is_named(small_settings: Callable[..., Settings]) -> None:
    with pytest.raises(FileNotFoundError, match=r"corpus.general=nowhere: no such file or folder"):
        make(small_settings("corpus.general=nowhere"), "corpus")
    with pytest.raises(SettingsError, match=r"corpus.general_share='1': must be less than 1"):
        small_settings("corpus.general_share=1")
