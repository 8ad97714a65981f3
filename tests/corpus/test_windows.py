"""Windows of long passages: what they cover, what they are called, and who trains on them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from drama_dist.corpus.collection import Collection, PassageTable, open_collection
from drama_dist.corpus.split import count_words, word_spans
from drama_dist.corpus.windows import cut, windows, windows_by_passage
from drama_dist.records import Example, Passage, Query, read_records
from drama_dist.run.artefact import read_provenance
from drama_dist.run.folder import OtherSettings, fingerprint
from drama_dist.run.graph import artefacts_of, order_of
from drama_dist.run.runner import Run, make
from drama_dist.settings import Settings, SettingsError
from tests.conftest import write_lines


@pytest.mark.parametrize(("words", "step"), [(1, 1), (7, 5), (7, 7), (120, 90)])
@pytest.mark.parametrize("total", [1, 6, 7, 8, 12, 13, 119, 120, 121, 210, 211, 1000])
def test_every_word_is_in_a_window_and_no_window_in_the_one_before(words: int, step: int, total: int) -> None:
    text = " ".join(map(str, range(total)))
    parts = [list(map(int, window.split())) for window in cut(text, words, step)]
    assert sorted({word for part in parts for word in part}) == list(range(total))
    for number, part in enumerate(parts):
        assert part == list(range(number * step, min(number * step + words, total)))
    assert parts[-1][-1] == total - 1 and all(part[-1] < total - 1 for part in parts[:-1])


def test_white_space_inside_a_window_stays_and_a_short_text_stays_whole() -> None:
    text = " a  b\n\nc\td e f "
    assert cut(text, 3, 2) == ["a  b\n\nc", "c\td e", "e f"]
    assert cut(text, 6, 2) == [text] and cut("", 6, 2) == [""]


def test_a_windows_title_counts_among_its_words() -> None:
    """So that nobody who reads title and text together, as the teacher does, has to cut it again."""
    passage = Passage("a", " ".join(map(str, range(300))), title="a title of five words")
    found = list(windows(PassageTable.in_memory([passage]), 120, 90))
    assert [len(window.content.split()) for window in found] == [120, 120, 120, 35]
    assert all(cut(window.content, 120, 90) == [window.content] for window in found)


def test_the_language_of_a_collection_without_queries_is_its_most_common_one() -> None:
    texts = [Passage("a", "ein Satz", language="de"), *(Passage(f"b{n}", "a text", language="en") for n in range(2))]
    assert Collection(PassageTable.in_memory(texts), [], {}).language == "en"
    assert Collection(PassageTable.in_memory(texts), [Query("q", "eine Frage", "de")], {}).language == "de"


def test_text_without_spaces_is_cut_at_characters() -> None:
    text = "".join(chr(0x4E00 + number) for number in range(1000))
    assert len(word_spans(text)) == count_words(text) == 250
    parts = cut(text, 120, 90)
    assert [len(part) for part in parts] == [480, 480, 280] and parts[1] == text[360:840] and parts[-1] == text[720:]
    for words in ("съешь ещё этих мягких французских булок", "Übergrößenträger naïve", "x" * 50):
        assert [words[begin:end] for begin, end in word_spans(words)] == words.split()


def test_ids_that_are_taken_are_left_to_their_passages() -> None:
    long = " ".join(map(str, range(8)))
    table = PassageTable.in_memory(
        [
            Passage("a", long, "A title", "no"),
            Passage("a#1", "one word more", "", "en"),
            Passage("a#", long),
            Passage("b", long),
        ]
    )
    made = list(windows(table, 5, 4))
    assert [passage.id for passage in made] == ["a##0", "a##1", "a#1", "a###0", "a###1", "b#0", "b#1"]
    assert made[1] == Passage("a##1", "4 5 6 7", "A title", "no") and made[2] == table[1]


def test_a_table_is_the_same_whenever_it_is_written(tmp_path: Path) -> None:
    passages = [Passage(f"p{number}", "words", "", "en") for number in range(2500)]
    for name, count in (("first", 2500), ("second", 2500), ("other", 2499)):
        PassageTable.write(tmp_path / name, iter(passages[:count]))
        time.sleep(0.01)
    assert fingerprint(tmp_path / "first") == fingerprint(tmp_path / "second") != fingerprint(tmp_path / "other")
    assert not list(tmp_path.glob("*.tmp"))
    assert list(PassageTable.open(tmp_path / "first").ids) == [passage.id for passage in passages]


def test_a_step_beyond_the_window_is_refused(small_settings: Callable[..., Settings]) -> None:
    with pytest.raises(SettingsError, match=r"window_step=90 is more than corpus\.window_words=80"):
        small_settings("corpus.window_words=80")


def test_examples_are_of_windows_and_what_is_searched_is_whole_passages(
    small_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    rows = [{"_id": f"d{n}", "title": f"T{n}", "text": f"Sentence {n} has five words. " * 12} for n in range(20)]
    changes = [f"corpus.path={write_lines(tmp_path / 'long.jsonl', rows)}", "corpus.held_out_queries=4"]
    changes += ["corpus.window_words=30", "corpus.window_step=20", "augment.synthetic_queries=0"]
    settings = small_settings(*changes)
    run = Run(settings)
    run.make("augment", "encode/corpus/bm25")
    corpus, texts = (open_collection(run.path(name)) for name in ("corpus", "windows"))
    assert len(corpus.queries) == 4 and not texts.queries and not texts.qrels
    assert len(corpus.passages) == 20 and len(texts.passages) > 40
    first = texts.passages[0]
    assert first.id == "d0#0" and first.title == "T0" and count_words(first.content) == 30
    examples = read_records(run.path("augment") / "examples.jsonl", Example.from_json)
    assert {id for row in examples for id in (*row.positives, *row.negatives)} <= set(texts.passages.ids)
    for name, passages in (("encode/corpus/bm25", corpus.passages), ("encode/windows/teacher", texts.passages)):
        assert read_provenance(run.folder / name)["passages"] == len(passages)
    assert make(small_settings(*changes, "corpus.window_words=40"), "corpus") == run.folder / "corpus"
    with pytest.raises(OtherSettings, match=r"corpus.window_words: 30 in the folder, 40 now"):
        make(small_settings(*changes, "corpus.window_words=40"), "corpus", collection="windows")


@pytest.mark.parametrize("path", ["windows", "data/windows", "corpus", "data/corpus"])
def test_no_other_collection_takes_the_place_of_the_runs_own(
    path: str, small_settings: Callable[..., Settings]
) -> None:
    settings = small_settings(f"evaluate.collections=[{path}]")
    (label,) = settings.evaluate.collection_labels
    assert label.startswith(f"{Path(path).name}-") and settings.evaluate.collection_labels[label] == path
    own = Path(path).name
    assert artefacts_of(settings, "encode", own, "bm25") == [f"encode/{own}/bm25"]
    assert artefacts_of(settings, "corpus", label) == [f"collections/{label}"]


def test_training_needs_windows_and_their_encodings(small_settings: Callable[..., Settings]) -> None:
    settings = small_settings("train.soft_target_weight=1", "evaluate.systems=[bm25]")
    order = {artefact.name for artefact in order_of(settings, "train")}
    assert {"corpus", "windows", "encode/windows/teacher", "encode/windows/bm25"} < order
    assert not {name for name in order if name.startswith("encode/corpus/")}
    assert "windows" not in {artefact.name for artefact in order_of(settings, "evaluate/corpus")}


@pytest.mark.parametrize("ids", [["c", "c#", "c#0"], ["c#"], ["a", "a#0", "b"], ["x##", "x"]])
def test_windows_find_their_passages_whatever_ids_are(ids: list[str]) -> None:
    table = PassageTable.in_memory(Passage(id, f"{number} " + "word " * 20) for number, id in enumerate(ids))
    made = list(windows(table, 8, 6))
    of_passage = windows_by_passage([window.id for window in made], ids)
    assert {id: [number for number, window in enumerate(made) if window.id in of_passage[id]] for id in ids} == {
        id: list(range(position * (len(made) // len(ids)), (position + 1) * (len(made) // len(ids))))
        for position, id in enumerate(ids)
    }
    assert windows_by_passage(["a#0", "a#1", "other", "other#0", "a#2"], ["a"]) == {"a": ["a#0", "a#1"]}
