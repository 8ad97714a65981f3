"""The corpus stage: every form that is read, what is set aside, and held-out queries."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from drama_dist.corpus.collection import Collection, open_collection
from drama_dist.run.runner import make
from drama_dist.settings import Settings

Build = Callable[..., Collection]
LONG = "It then says so much more about this one thing that nobody who reads it can be in doubt of what is meant."
ROWS: list[dict[str, Any]] = [
    {"_id": f"d{n}", "title": "", "text": f"The number {n} is described in this place. {LONG} {n}"} for n in range(30)
]


@pytest.fixture
def build(small_settings: Callable[..., Settings], tmp_path: Path) -> Build:
    def run(path: Path, *overrides: str) -> Collection:
        return open_collection(make(small_settings(f"corpus.path={path}", *overrides), "corpus"))

    return run


def lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def beir(folder: Path, queries: list[Any], qrels: list[str], rows: list[Any] = ROWS) -> Path:
    lines(folder / "corpus.jsonl", rows)
    lines(folder / "queries.jsonl", queries)
    lines(folder / "qrels" / "test.tsv", ["query-id\tcorpus-id\tscore", *qrels])
    return folder


def set_aside(tmp_path: Path, stage: str = "corpus") -> list[tuple[str, int, str]]:
    path = tmp_path / "run" / stage / "set_aside.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [(Path(row["file"]).name, row["line"], row["reason"]) for row in rows]


def test_first_sentences_become_queries_and_leave_their_passages(build: Build, tmp_path: Path) -> None:
    corpus = build(lines(tmp_path / "p.jsonl", ROWS))
    assert len(corpus.passages) == 30 and len(corpus.queries) == 12
    texts = {row["_id"]: row["text"] for row in ROWS}
    for query in corpus.queries:
        (passage_id,) = corpus.qrels[query.id]
        rest = corpus.passages[corpus.passages.position(passage_id)].text
        assert query.text.startswith("The number") and query.text not in rest
        assert f"{query.text} {rest}" == texts[passage_id]


def test_the_seed_decides_which_queries_are_held_out(build: Build, tmp_path: Path) -> None:
    file = lines(tmp_path / "p.jsonl", ROWS)
    held_out = [
        [query.id for query in build(file, f"run={tmp_path / str(n)}", f"seed={seed}").queries]
        for n, seed in enumerate((1, 1, 2))
    ]
    assert held_out[0] == held_out[1] != held_out[2]


def test_a_query_that_several_passages_begin_with_is_not_held_out(build: Build, tmp_path: Path) -> None:
    same = [{**row, "text": f"They all begin like this one. {LONG} {row['_id']}"} for row in ROWS[:20]]
    corpus = build(lines(tmp_path / "p.jsonl", [*same, *ROWS[20:]]))
    assert all(query.text.startswith("The number") for query in corpus.queries) and len(corpus.queries) == 5


def test_judged_collections_keep_every_passage_and_the_judged_queries(build: Build, tmp_path: Path) -> None:
    queries = [{"_id": "q1", "text": "one"}, {"_id": "q2", "text": "two"}]
    corpus = build(beir(tmp_path / "b", queries, ["q1\td3\t2"], [*ROWS, {"_id": "x", "text": "tiny"}]))
    assert len(corpus.passages) == 31 and [query.id for query in corpus.queries] == ["q1"]
    assert corpus.qrels == {"q1": {"d3": 2}}


def test_a_beir_folder_without_judgements_and_datasets_on_disk_are_read(build: Build, tmp_path: Path) -> None:
    lines(tmp_path / "plain" / "corpus.jsonl", ROWS)
    rows = [{"id": row["_id"], "text": row["text"]} for row in ROWS]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "hf"))
    DatasetDict({"test": Dataset.from_list(rows[:2]), "train": Dataset.from_list(rows)}).save_to_disk(
        str(tmp_path / "hfs")
    )
    for name in ("plain", "hf", "hfs"):
        corpus = build(tmp_path / name, f"run={tmp_path / ('run-' + name)}")
        assert sorted(corpus.passages.ids) == sorted(row["_id"] for row in ROWS)
        assert len(corpus.queries) == 12


@pytest.mark.parametrize(
    ("rows", "overrides", "remedy"),
    [
        ([{"_id": f"s{n}", "text": f"{LONG} {n}"} for n in range(20)], [], "give longer passages, set corpus.language"),
        (
            [{"_id": f"s{n}", "text": f"Title number {n} of many"} for n in range(20)],
            [],
            "begin with a sentence of 4 to 40",
        ),
        ([{"_id": f"z{n}", "text": "水" * 90 + str(n)} for n in range(20)], ["corpus.language=zh"], "if 'zh' is wrong"),
        (ROWS, ["corpus.held_out_queries=0"], "set corpus.held_out_queries"),
    ],
    ids=["one sentence", "titles", "no full stops", "none asked for"],
)
def test_a_corpus_without_test_queries_is_stored_and_it_is_said_once(
    build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[Any], overrides: list[str], remedy: str
) -> None:
    corpus = build(lines(tmp_path / "p.jsonl", rows), *overrides)
    assert (len(corpus.passages), corpus.queries, corpus.qrels) == (len(rows), [], {})
    assert corpus.language == (overrides[0][-2:] if "language" in str(overrides) else "en")
    (said,) = [line for line in capsys.readouterr().err.splitlines() if "no test queries" in line]
    assert "the run trains, exports and reports without an evaluation" in said and remedy in said


def test_files_that_are_not_read_do_not_change_the_inputs(
    small_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    data = beir(tmp_path / "data", [{"_id": "q1", "text": "one"}], ["q1\td3\t1"])
    settings = small_settings(f"corpus.path={data}", f"run={data / 'run'}")
    made = (make(settings, "corpus") / "provenance.json").stat().st_mtime_ns
    for name in (".DS_Store", "notes.txt", "notes.tsv", "provenance.json", "qrels/.DS_Store", "other/corpus.jsonl"):
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).write_text('{"fingerprint": "of somebody else"', "utf-8")
    assert (make(settings, "corpus") / "provenance.json").stat().st_mtime_ns == made
    lines(data / "queries.jsonl", [{"_id": "q1", "text": "another"}])
    with pytest.raises(ValueError, match=r"inputs.source"):
        make(settings, "corpus")


def test_other_collections_are_read_as_the_corpus_is(small_settings: Callable[..., Settings], tmp_path: Path) -> None:
    folder = tmp_path / "other"
    lines(folder / "collection.tsv", ["1\tone text", "2\ttwo texts"])
    lines(folder / "queries.jsonl", [{"qid": "q", "asked": "what"}])
    lines(folder / "qrels.txt", ["q 0 2 1"])
    keys = ["corpus.text_keys=[text, asked]", f"evaluate.collections=[{folder}]"]
    stored = open_collection(make(small_settings(*keys), "corpus", collection="other"))
    assert stored.passages.ids == ["1", "2"] and [query.text for query in stored.queries] == ["what"]
    assert stored.qrels == {"q": {"2": 1}}
    (folder / "qrels.txt").unlink()
    with pytest.raises(ValueError, match=r"other: no judged queries: expected queries.jsonl and qrels/test.tsv"):
        make(small_settings(*keys, f"run={tmp_path / 'second'}"), "corpus", collection="other")


def test_reasons_are_counted_by_kind(build: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = lines(tmp_path / "p.jsonl", [*ROWS, *ROWS[:2], {"_id": "u", "text": f"half \ud800 a letter {LONG}"}])
    file.write_bytes(file.read_bytes() + b"".join(b"x" * n + b"\xff\n" for n in range(30)))
    build(file, "corpus.bad_record_limit=0.9")
    said = capsys.readouterr().err
    assert "corpus: set aside 30 invalid UTF-8, 2 duplicate id; listed in corpus/set_aside.jsonl" in said
    assert "corpus: in 1 text, halves of characters" in said


def test_texts_in_capitals_become_lower_case(build: Build, tmp_path: Path) -> None:
    rows = [*ROWS, {"_id": "loud", "title": "NATO", "text": "NATO MET IN PARIS ON MONDAY"}]
    queries = [{"_id": "q1", "text": "WHO MET IN PARIS?"}, {"_id": "q2", "text": "NATO in Paris"}]
    corpus = build(beir(tmp_path / "loud", queries, ["q1\tloud\t1", "q2\tloud\t1"], rows))
    (loud,) = [passage for passage in corpus.passages if passage.id == "loud"]
    assert (loud.title, loud.text) == ("NATO", "nato met in paris on monday")
    assert [query.text for query in corpus.queries] == ["who met in paris?", "NATO in Paris"]


def test_trivial_and_repeated_passages_are_set_aside(build: Build, tmp_path: Path) -> None:
    rows = [*ROWS, {"_id": "t", "text": "too short"}, {**ROWS[4], "_id": "again"}]
    assert len(build(lines(tmp_path / "p.jsonl", rows)).passages) == 30
    reasons = [reason for _, _, reason in set_aside(tmp_path)]
    assert reasons == ["trivial: fewer words than corpus.min_words", "duplicate of d4"]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"_id": "d3", "text": "Another text under an old name, long enough to stay."}, "duplicate id"),
        ("{not json", "not JSON"),
        ({"_id": "n1", "title": "no text"}, "text"),
        ({"text": "no id but long enough to be a passage"}, "id"),
        ({"_id": "n2", "text": 7}, "text"),
    ],
    ids=["duplicate id", "not JSON", "no text", "no id", "text of another type"],
)
def test_a_bad_passage_is_set_aside_up_to_the_limit(build: Build, tmp_path: Path, bad: Any, reason: str) -> None:
    file = lines(tmp_path / "p.jsonl", [*ROWS[:10], bad, *ROWS[10:]])
    with pytest.raises(ValueError, match=r"1 of 31 records cannot be used, more than corpus.bad_record_limit=0.01"):
        build(file, f"run={tmp_path / 'strict'}")
    assert len(build(file, "corpus.bad_record_limit=0.1").passages) == 30
    ((name, line, recorded_reason),) = set_aside(tmp_path)
    assert (name, line) == ("p.jsonl", 11) and reason in recorded_reason


def test_invalid_utf8_is_set_aside_with_its_line(build: Build, tmp_path: Path) -> None:
    file = lines(tmp_path / "p.jsonl", ROWS)
    file.write_bytes(file.read_bytes() + b'{"_id": "u", "text": "\xff"}\n')
    build(file, "corpus.bad_record_limit=0.1")
    assert set_aside(tmp_path) == [("p.jsonl", 31, "invalid UTF-8 at byte 22")]


def test_bad_queries_and_judgements_are_set_aside(build: Build, tmp_path: Path) -> None:
    queries = [{"_id": "q1", "text": "one"}, {"_id": "q2", "text": " "}, {"_id": "q3", "text": "three"}]
    judgements = ["q1\td1\t1", "q3\tmissing\t1", "q9\td1\t1", "q3\td2\tyes", "q3\td2\t1"]
    corpus = build(beir(tmp_path / "b", queries, judgements), "corpus.bad_record_limit=0.2")
    assert corpus.qrels == {"q1": {"d1": 1}, "q3": {"d2": 1}}
    assert {(name, line) for name, line, _ in set_aside(tmp_path)} == {
        ("queries.jsonl", 2),
        ("test.tsv", 3),
        ("test.tsv", 4),
        ("test.tsv", 5),
    }


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, "no such file or folder"),
        ([], ValueError, "no usable passage among 0 records"),
        ([{"_id": "a", "text": "tiny"}], ValueError, "all 1 passages are trivial; lower corpus.min_words"),
    ],
    ids=["missing", "empty", "trivial"],
)
def test_no_corpus_is_an_error(
    build: Build, tmp_path: Path, content: list[Any] | None, error: type[Exception], message: str
) -> None:
    if content is not None:
        lines(tmp_path / "p.jsonl", content)
    with pytest.raises(error, match=message):
        build(tmp_path / "p.jsonl")


def test_a_folder_of_another_form_is_described(build: Build, tmp_path: Path) -> None:
    lines(tmp_path / "odd" / "notes.txt", ["x"])
    with pytest.raises(ValueError, match=r"expected a BEIR folder .* found \['notes.txt'\]"):
        build(tmp_path / "odd")


def test_docs_of_packages_give_queries_without_the_objects_name(build: Build) -> None:
    corpus = build(Path("installed-packages"), "corpus.packages=[networkx]", "corpus.held_out_queries=40")
    assert len(corpus.queries) == 40 and len(corpus.passages) > 500
    for query in corpus.queries:
        name = query.id.rsplit(".", 1)[-1].lower()
        assert name not in query.text.lower().split()
