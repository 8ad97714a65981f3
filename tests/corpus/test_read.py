"""What rows become: ids, texts and judgements in every form that is read, and what is set aside."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from drama_dist.corpus.judgements import read_judgements
from drama_dist.corpus.read import RawCorpus, SetAside, read_corpus
from drama_dist.records import LONGEST_RECORD, BadRecord
from drama_dist.settings import CorpusSettings

ROWS = [{"_id": f"d{n}", "text": f"text {n}"} for n in range(4)]
QUERIES = [{"_id": f"q{n}", "text": f"query {n}"} for n in range(4)]


def read(path: Path, aside: SetAside | None = None, **settings: Any) -> RawCorpus:
    return read_corpus(path, CorpusSettings(path=str(path), **settings), aside or SetAside())


def lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"\n".join(raw) + b"\n")
    return path


def beir(folder: Path, name: str, judgements: str | bytes) -> Path:
    lines(folder / "corpus.jsonl", ROWS)
    lines(folder / "queries.jsonl", QUERIES)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(judgements if isinstance(judgements, bytes) else judgements.encode())
    return folder


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq0\td1\t2\nq1\td0\t-2\n"),
        ("qrels/test.tsv", "q0\td1\t2\nq1\td0\t-2"),
        ("qrels/test.tsv", b"\xef\xbb\xbfquery-id\tcorpus-id\tscore\r\nq0\td1\t2.0\r\n\r\nq1\td0\t-2.0\r\n"),
        ("qrels.tsv", "query_id\tdoc_id\trelevance\nq0\td1\t+2\nq1\td0\t-2\n"),
        ("qrels.txt", "q0 0 d1 2\nq1 0 d0 -2\n"),
        ("qrels.trec", "q0\tQ0\td1\t2\nq1\tQ0\td0\t-2\n"),
        ("qrels/test.txt", "  q0   0\td1   2  \n q1 0 d0\t-2\n"),
        ("qrels/test.jsonl", '{"query-id": "q0", "corpus-id": "d1", "score": 2}\n{"qid":"q1","pid":"d0","label":"-2"}'),
        ("qrels.json", '[{"query_id": "q0", "docid": "d1", "rel": 2.0}, {"query_id":"q1","docid":"d0","rel":-2}]'),
        ("qrels.csv", "query-id,corpus-id,score\nq0,d1,2\nq1,d0,-2\n"),
        ("qrels.csv", "Score,Corpus-ID,Query-ID\n2,d1,q0\n-2,d0,q1\n"),
        ("qrels/test.tsv", "corpus-id\tquery-id\tscore\nd1\tq0\t2\nd0\tq1\t-2\n"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\titeration\nq0\td1\t2\t0\nq1\td0\t-2\t0\n"),
        ("qrels/test.tsv", "Score\tQuery-ID\tnote\tuser\tpid\n2\tq0\t\tu\td1\n-2\tq1\tn\tu\td0\n"),
        ("qrels/test.tsv", '"score"\t"query-id"\t"corpus-id"\n"2"\t"q0"\t"d1"\n"-2"\t"q1"\t"d0"\n'),
        ("qrels.txt", "rel docno qid\n2 d1 q0\n-2 d0 q1\n"),
        ("qrels.tsv", "topic\titer\tdocno\trel\nq0\t0\td1\t2\nq1\t0\td0\t-2\n"),
    ],
)
def test_judgements_are_read_in_every_form(tmp_path: Path, name: str, content: str | bytes) -> None:
    raw = read(beir(tmp_path / "b", name, content))
    assert raw.qrels == {"q0": {"d1": 2}, "q1": {"d0": -2}}
    assert [query.id for query in raw.queries] == ["q0", "q1"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("query-id\tcorpus-id\tscore\n", "has no judgements"),
        ("", "has no judgements"),
        ("q0\tother\t1\n", r"no usable judgement among 1; the first: .*test.tsv:1: names a passage that is not in"),
        ("q0\td1\t0.5\n", "no usable judgement among 1; .* expected a whole number up to 1000000 as grade"),
        ("q0 Q0 d1 1 0.9 run\n", "no usable judgement among 1; .* expected query, passage and grade"),
        ("q0\t\t1\n", "no usable judgement among 1; .* passage id is empty"),
        ("score\tqid\tpid\n1\tq0\n", "no usable judgement among 1; .* expected the 3 columns of the header"),
    ],
    ids=["header only", "empty", "another corpus", "fractions", "a run", "no passage", "a column less"],
)
def test_judgements_without_a_usable_one_are_an_error(tmp_path: Path, content: str, problem: str) -> None:
    with pytest.raises(ValueError, match=f"qrels/test.tsv: {problem}.*; mend it, or take it away"):
        read(beir(tmp_path / "b", "qrels/test.tsv", content))


@pytest.mark.parametrize("header", ["corpus-id\tasked\tscore", "query-id\tfound\tscore", "qid pid much", "a b rel"])
def test_a_header_of_judgements_that_lacks_a_column_is_refused(tmp_path: Path, header: str) -> None:
    folder = beir(tmp_path / "b", "qrels/test.tsv", f"{header}\nq0\td1\t1\n")
    with pytest.raises(ValueError, match=r"qrels/test.tsv:1: the header has .*: expected one of each: query-id, "):
        read(folder)


def test_a_judgement_without_known_names_is_set_aside_with_those_it_has(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"query": "q", "found": "p", "score": 1}\n', "utf-8")
    ((_, bad),) = read_judgements(tmp_path / "q.jsonl")
    assert isinstance(bad, BadRecord) and bad.problem == "no query id or no passage id (it has query, found, score)"


@pytest.mark.parametrize(
    ("row", "id", "text"),
    [
        ({"id": "q", "question": "what?", "document": "gold"}, "q", "what?"),
        ({"query_id": "q", "pid": "7", "text": "what?"}, "q", "what?"),
        ({"qid": "q", "docid": "7", "Query": "what?", "passage": "gold"}, "q", "what?"),
        ({"_id": "q", "text": "what?", "metadata": {"query": "no"}}, "q", "what?"),
    ],
)
def test_a_query_beside_its_passage_is_read_under_its_own_names(
    tmp_path: Path, row: dict[str, Any], id: str, text: str
) -> None:
    folder = beir(tmp_path / "b", "qrels/test.tsv", "q\td1\t1\n")
    lines(folder / "queries.jsonl", [row])
    assert [(query.id, query.text) for query in read(folder).queries] == [(id, text)]


@pytest.mark.parametrize(
    "grade", ["--1", "²", "9" * 5000, "nan", "1e3", "inf", "", "1_0", "0x1", "1.5", "1000001", "١"]
)
def test_a_grade_that_is_no_sensible_number_is_set_aside(tmp_path: Path, grade: str) -> None:
    (tmp_path / "q.tsv").write_text(f"q\tp\t{grade}\nq\tp\t1\n", "utf-8")
    (_, bad), (line, good) = read_judgements(tmp_path / "q.tsv")
    assert isinstance(bad, BadRecord) and bad.line == 1 and (line, good) == (2, ("q", "p", 1))


def test_judging_again_with_another_grade_is_set_aside(tmp_path: Path) -> None:
    aside = SetAside()
    raw = read(beir(tmp_path / "b", "qrels.tsv", "q0\td1\t2\nq0\td1\t2\nq0\td1\t0\n"), aside)
    assert raw.qrels == {"q0": {"d1": 2}}
    assert [(record.line, record.reason) for record in aside.unusable] == [
        (3, "judges a passage again, with another grade")
    ]


@pytest.mark.parametrize("key", ["_id", "id", "docid", "doc_id", "pid", "docno"])
def test_a_records_own_id_is_kept_in_datasets_too(tmp_path: Path, key: str) -> None:
    rows = [{key: f"own-{n}", "text": f"text {n}"} for n in range(3)]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "hf"))
    for path in (tmp_path / "hf", lines(tmp_path / "c.jsonl", rows)):
        assert [passage.id for passage in read(path).passages] == ["own-0", "own-1", "own-2"]


def test_where_no_record_has_an_id_they_get_numbers_and_it_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Dataset.from_list([{"text": "a b"}, {"text": "c d"}]).save_to_disk(str(tmp_path / "hf"))
    lines(tmp_path / "shards" / "1.jsonl", [{"text": "a b"}])
    lines(tmp_path / "shards" / "2.jsonl", [{"text": "c d"}])
    for path in (tmp_path / "hf", tmp_path / "shards"):
        assert [passage.id for passage in read(path).passages] == ["row-1", "row-2"]
        assert capsys.readouterr().err.count("no record has an id (corpus.id_keys)") == 1


def test_records_do_not_get_numbers_where_others_have_ids_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = lines(tmp_path / "c.jsonl", [{"id": 1.5, "text": "x"}, {"text": "y"}])
    with pytest.raises(ValueError, match=r"no usable passage among 2 records; the first: .* id is a floating-point"):
        read(path)
    assert "no record has an id" not in capsys.readouterr().err


def test_a_record_without_an_id_among_others_is_set_aside(tmp_path: Path) -> None:
    aside = SetAside()
    assert len(read(lines(tmp_path / "c.jsonl", [{"text": "x"}, ROWS[0]]), aside).passages) == 1
    (bad,) = aside.unusable
    assert bad.line == 1 and bad.problem.startswith("no id under _id, id, ") and bad.problem.endswith("it has text")


@pytest.mark.parametrize(
    ("row", "text", "title"),
    [
        ({"pid": 7, "passage": "x"}, "x", ""),
        ({"id": "7", "body": ["one ", "", "two"], "headline": ["A", "B"]}, "one\n\ntwo", "A B"),
        ({"id": 7, "text": "x", "title": 1900}, "x", "1900"),
        ({"id": 7, "text": "x", "title": 10**400}, "x", str(10**400)),
        ({"id": 7, "text": "", "title": "T"}, "", "T"),
        ({"id": "7", "text": "half \ud83d of it", "title": "\udc00"}, "half \ufffd of it", "\ufffd"),
        ({"id": "7", "text": "nul \x00, line \u2028"}, "nul \x00, line", ""),
        ({"ID": 7, " Text": "x", "TITLE": "T"}, "x", "T"),
        ({"id": 7, "ID": 8, "text": "x", "Text": "y"}, "x", ""),
        ({"id": 7, "text": "x", "title": False, "headline": "H"}, "x", "H"),
        ({"id": 7, "text": "x", "title": {}, "language": []}, "x", ""),
        ({"id": 7, "text": "x", "title": [{}], "language": 5}, "x", ""),
        ({"id": 7, "text": "x", "title": float("inf"), "language": {"a": 1}}, "x", ""),
        (b'{"id": 7, "text": "x", "metadata": {"a": 1, "a": 2}, "url": 1, "url": 2}', "x", ""),
    ],
)
def test_records_in_other_words_are_read(tmp_path: Path, row: Any, text: str, title: str) -> None:
    (passage,) = read(lines(tmp_path / "c.jsonl", [row])).passages
    assert (passage.id, passage.text, passage.title) == ("7", text, title)


def test_the_settings_say_under_which_names_the_parts_are(tmp_path: Path) -> None:
    path = lines(tmp_path / "c.jsonl", [{"key": "k", "words": "x", "text": "no", "name": "T", "tongue": "de"}])
    keys = {"id_keys": ["key"], "text_keys": ["words"], "title_keys": ["name"], "language_keys": ["tongue"]}
    assert [vars(passage) for passage in read(path, **keys).passages] == [
        {"id": "k", "text": "x", "title": "T", "language": "de"}
    ]
    with pytest.raises(
        ValueError, match=r"no usable passage among 1 records; the first: .*:1: no text under other .*it has key, words"
    ):
        read(path, text_keys=["other"])


BAD = {
    "not JSON": [
        b"{not json",
        b'{"_id": "x", "text": "\x00"}',
        b"\x00",
        b'{"_id": "x", "text": "cut',
        b'{"_id": "x"}}',
    ],
    "expected a JSON object": [b"[1]", b'"text"', b"null", b"7"],
    "invalid UTF-8": [b'{"_id": "x", "text": "\xff"}', b"\xff\xfe{}", b"\xed\xa0\x80"],
    "nested too deeply": [b'{"_id": "x", "text": "y", "a": ' + b"[" * 10**5 + b"]" * 10**5 + b"}"],
    "a number of thousands of digits": [b'{"_id": "x", "text": "y", "n": ' + b"9" * 5000 + b"}"],
    "a key is named twice": [b'{"_id": "x", "text": "y", "_id": "z"}', b'{"_id": "x", "TEXT": "y", "Text": "z"}'],
    "longer than 16 MiB": [b'{"_id": "x", "text": "' + b"y" * LONGEST_RECORD + b'"}'],
    "no text": [{"_id": "x"}, {"_id": "x", "title": "T"}, {"_id": "x", "text": " "}, {"_id": "x", "text": []}],
    "no id": [{"text": "y"}, {"_id": None, "text": "y"}],
    "id is empty": [{"_id": "", "text": "y"}, {"_id": " ", "text": "y"}],
    "id is a floating-point number": [{"_id": number, "text": "y"} for number in (1.0, 1.5, float("nan"))],
    "id is true or false": [{"_id": True, "text": "y"}],
    "id is a map": [{"_id": {"a": 1}, "text": "y"}],
    "id is not valid Unicode": [{"_id": "\ud800", "text": "y"}],
    "id has a tab, a line break or another control character": [
        {"_id": f"a{mark}b", "text": "y"} for mark in "\t\n\r\x00\x1b\x85\u2028"
    ],
    "text is a number": [{"_id": "x", "text": 7}],
    "text is a list": [{"_id": "x", "text": [["y"]]}],
    "text is null": [{"_id": "x", "text": [None]}],
    "text is a map": [{"_id": "x", "text": {"y": 1}}],
    "duplicate id": [{"_id": "d0", "text": "y"}],
}


@pytest.mark.parametrize("reason", BAD)
def test_each_kind_of_bad_record_is_set_aside_with_its_line(tmp_path: Path, reason: str) -> None:
    aside, bad = SetAside(), BAD[reason]
    raw = read(lines(tmp_path / "c.jsonl", [*ROWS[:2], *bad, *ROWS[2:]]), aside)
    assert [passage.id for passage in raw.passages] == ["d0", "d1", "d2", "d3"]
    assert {record.reason for record in aside.unusable} == {reason}
    assert [record.line for record in aside.unusable] == list(range(3, 3 + len(bad)))
    for record in aside.unusable:
        assert str(record).startswith(f"{tmp_path}/c.jsonl:{record.line}: {reason}") and len(str(record)) < 500
        str(record).encode()


def test_a_text_beyond_the_longest_is_set_aside_where_no_line_bounds_it(tmp_path: Path) -> None:
    aside = SetAside()
    (tmp_path / "c.json").write_text(json.dumps([*ROWS, {"_id": "x", "text": "y" * (LONGEST_RECORD + 1)}]), "utf-8")
    assert len(read(tmp_path / "c.json", aside).passages) == 4
    assert [record.problem for record in aside.unusable] == ["text is longer than 16 MiB"]


def test_bad_records_do_not_stay_in_memory(tmp_path: Path) -> None:
    bad = [
        b'{"_id": "' + b"x" * 10**6 + b"\xff",
        {"_id": 1.5, "text": "y" * 10**6},
        {"text": ["z" * 10**6]},
        b"[" * 10**6,
    ]
    path, aside = lines(tmp_path / "c.jsonl", [*ROWS, *bad * 5]), SetAside()
    tracemalloc.start()
    read(path, aside)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(aside.unusable) == 20 and held < 500_000


def test_rows_of_datasets_are_checked_as_those_of_files(tmp_path: Path) -> None:
    rows = [{"id": "a", "text": "x"}, {"id": None, "text": "x"}, {"id": "c", "text": None}, {"id": "d\t", "text": "x"}]
    Dataset.from_list([*rows, {"id": "e", "text": "y"}]).save_to_disk(str(tmp_path / "hf"))
    aside = SetAside()
    assert [passage.id for passage in read(tmp_path / "hf", aside).passages] == ["a", "e"]
    assert sorted((record.line, record.reason[:7]) for record in aside.unusable) == [
        (2, "no id"), (3, "no text"), (4, "id has ")
    ]  # fmt: skip
    Dataset.from_dict({"id": [7, 8], "text": [{"a": "x"}, {"a": "y"}]}).save_to_disk(str(tmp_path / "nested"))
    with pytest.raises(ValueError, match=r"no usable passage among 2 records; the first: .*nested:1: text is a map"):
        read(tmp_path / "nested")


def test_what_is_set_aside_can_be_written_whatever_its_name(tmp_path: Path) -> None:
    record = BadRecord(b"caf\xe9".decode("utf-8", "surrogateescape"), 3, "no text", {"\ud800": "\udfff"}, "\udcff")
    (row,) = SetAside([record]).as_rows()
    json.dumps(row, ensure_ascii=False).encode("utf-8")
    str(record).encode("utf-8")
