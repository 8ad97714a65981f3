"""Which files are read: judgements wherever they lie, one corpus file or shards, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from drama_dist.corpus.layout import find_sources

MARCO = ["collection.tsv", "queries.dev.tsv", "qrels.dev.tsv"]
PACKED = ["corpus.jsonl.gz", "queries.jsonl.gz", "qrels/test.tsv"]


def folder_with(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}", "utf-8")
    return folder


def found(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in find_sources(folder, "corpus.path").files]


@pytest.mark.parametrize(
    ("judgements", "chosen"),
    [
        (["qrels/test.tsv"], "qrels/test.tsv"),
        (["qrels/dev.tsv", "qrels/test.tsv", "qrels/train.tsv", "qrels.tsv"], "qrels/test.tsv"),
        (["qrels/train.tsv", "qrels/dev.tsv"], "qrels/dev.tsv"),
        (["qrels/test.txt", "qrels/dev.tsv"], "qrels/test.txt"),
        (["qrels/test.jsonl", "qrels/test.tsv"], "qrels/test.tsv"),
        (["qrels/test.tsv.gz"], "qrels/test.tsv.gz"),
        (["qrels/robust04"], "qrels/robust04"),
        (["qrels.tsv"], "qrels.tsv"),
        (["qrels.txt"], "qrels.txt"),
        (["qrels.jsonl"], "qrels.jsonl"),
        (["qrels.dev.tsv", "qrels-test.tsv"], "qrels-test.tsv"),
        (["2019qrels-pass.txt"], "2019qrels-pass.txt"),
        (["test.qrels"], "test.qrels"),
        (["robust_qrels.txt.gz"], "robust_qrels.txt.gz"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_judgements_are_found_and_the_others_named(tmp_path: Path, judgements: list[str], chosen: str) -> None:
    folder = folder_with(tmp_path / "b", "corpus.jsonl", "queries.jsonl", *judgements)
    assert found(folder) == ["corpus.jsonl", "queries.jsonl", chosen]
    notes = " ".join(find_sources(folder, "corpus.path").notes)
    assert all(Path(name).name in notes for name in judgements if len(judgements) > 1)


def test_judgements_and_queries_that_are_not_used_are_named(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "a", "corpus.jsonl", "queries.jsonl")
    assert found(folder) == ["corpus.jsonl"]
    assert "queries.jsonl but no judgements" in " ".join(find_sources(folder, "corpus.path").notes)
    folder = folder_with(tmp_path / "b", "corpus.jsonl", "qrels.txt")
    with pytest.raises(FileNotFoundError, match=r"queries.jsonl: not found, but .*qrels.txt judges its queries"):
        find_sources(folder, "corpus.path")
    (note,) = find_sources(folder / "corpus.jsonl", "corpus.path").notes
    assert "qrels.txt is not read; name the folder" in note


@pytest.mark.parametrize(
    "other",
    [
        *("make_qrels.py", "docs_without_qrels.jsonl", "myqrelsfile.tsv", "qrels.md", "qrels/test.tsv.license"),
        *("qrels/README", "qrels/README.md", "qrels/LICENSE.txt", "qrels/licence", "qrels/.test.tsv", "qrels/x.sha256"),
    ],
)
def test_what_only_sounds_like_judgements_is_not_read(tmp_path: Path, other: str) -> None:
    folder = folder_with(tmp_path / "b", "corpus.jsonl", "queries.jsonl", other)
    assert found(folder) == ["corpus.jsonl"]
    folder_with(folder, "qrels/test.tsv")
    assert found(folder) == ["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"]


def test_judgements_under_an_unknown_suffix_are_named(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "b", "corpus.jsonl", "queries.jsonl", "qrels.robust")
    assert "judgements are not read from qrels.robust: expected a name" in " ".join(find_sources(folder, "").notes)


@pytest.mark.parametrize(
    ("names", "queries", "judgements"),
    [
        (
            ["queries.dev.jsonl", "queries.test.jsonl", "qrels/dev.tsv", "qrels/test.tsv"],
            "queries.test.jsonl",
            "test.tsv",
        ),
        (["queries.dev.tsv", "queries.train.tsv", "qrels.train.tsv"], "queries.train.tsv", "qrels.train.tsv"),
        (["queries.dev.jsonl", "qrels/dev.tsv", "qrels/test.tsv"], "queries.dev.jsonl", "dev.tsv"),
        (["queries.jsonl", "queries.dev.jsonl", "qrels/test.tsv"], "queries.jsonl", "test.tsv"),
        (["queries.jsonl", "queries.test.jsonl", "qrels/test.tsv"], "queries.test.jsonl", "test.tsv"),
        (
            ["queries.dev.small.tsv", "queries.dev.tsv", "qrels.dev.small.tsv"],
            "queries.dev.small.tsv",
            "qrels.dev.small.tsv",
        ),
        (["queries.dev.small.tsv", "queries.dev.tsv", "qrels.dev.tsv"], "queries.dev.tsv", "qrels.dev.tsv"),
        (["test_queries.jsonl", "test_qrels.tsv"], "test_queries.jsonl", "test_qrels.tsv"),
        (["queries.dev.tsv", "qrels.tsv"], "queries.dev.tsv", "qrels.tsv"),
        (["queries.train.tsv", "queries.validation.tsv", "qrels/val.tsv"], "queries.validation.tsv", "val.tsv"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_queries_are_of_the_split_that_is_judged(
    tmp_path: Path, names: list[str], queries: str, judgements: str
) -> None:
    sources = find_sources(folder_with(tmp_path / "b", "docs.jsonl", *names), "corpus.path")
    assert [path.name for path in sources.files] == ["docs.jsonl", queries, judgements]
    notes = " ".join(sources.notes)
    assert all(Path(name).name in notes for name in names if Path(name).name not in (queries, judgements))


def test_queries_of_another_split_are_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "b", "corpus.jsonl", "queries.dev.jsonl", "qrels/test.tsv")
    with pytest.raises(FileNotFoundError, match=r"test.tsv judges its queries; queries.dev.jsonl has another split"):
        find_sources(folder, "corpus.path")


def test_queries_without_judgements_are_not_passages(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "b", "docs.jsonl", "test_queries.jsonl")
    assert found(folder) == ["docs.jsonl"]
    assert "has test_queries.jsonl but no judgements" in " ".join(find_sources(folder, "corpus.path").notes)


@pytest.mark.parametrize(
    ("names", "read", "note"),
    [
        (["corpus.jsonl", "corpus-2.jsonl"], ["corpus.jsonl"], "read from corpus.jsonl, not from corpus-2.jsonl"),
        (["a.jsonl", "b.json"], ["a.jsonl"], "passages are read from a.jsonl, not from b.json"),
        (["corpus.jsonl", "corpus.tsv", "x.csv"], ["corpus.jsonl"], "not from corpus.tsv, x.csv"),
        (["docs_without_qrels.jsonl"], ["docs_without_qrels.jsonl"], None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_passages_that_are_not_read_are_named(
    tmp_path: Path, names: list[str], read: list[str], note: str | None
) -> None:
    folder = folder_with(tmp_path / "b", *names)
    assert found(folder) == read
    notes = find_sources(folder, "corpus.path").notes
    assert note in notes[0] if note else not notes


def test_one_of_a_datasets_two_files_makes_no_dataset(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "b", "a.jsonl", "state.json")
    assert found(folder) == ["a.jsonl"]
    folder_with(folder, "c.parquet", "dataset_info.json").joinpath("state.json").write_text('{"_data_files": []}')
    sources = find_sources(folder, "corpus.path")
    assert sources.dataset == folder and "is a dataset, so a.jsonl, c.parquet are not read" in " ".join(sources.notes)


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["part-1.jsonl", "part-2.jsonl.gz"], ["part-1.jsonl", "part-2.jsonl.gz"]),
        (["data.parquet", "README.md", "settings.json", "provenance.json"], ["data.parquet"]),
        (["data.json"], ["data.json"]),
        (MARCO, MARCO),
        ([*PACKED, "corpus.JSON", "notes.txt"], PACKED),
        (["corpus.jsonl", "corpus.tsv", "notes.csv"], ["corpus.jsonl"]),
    ],
    ids=lambda names: " ".join(names),
)
def test_a_folder_of_files_of_one_form_is_a_corpus(tmp_path: Path, names: list[str], read: list[str]) -> None:
    assert found(folder_with(tmp_path / "f", *names)) == read


def test_a_folder_of_several_forms_is_refused(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "f", "a.jsonl", "b.tsv")
    with pytest.raises(ValueError, match=r"files of one form .*; files of several forms, .jsonl, .tsv"):
        find_sources(folder, "corpus.path")
    with pytest.raises(ValueError, match=r"corpus.path=/dev/null: neither a file nor a folder"):
        find_sources(Path("/dev/null"), "corpus.path")


@pytest.mark.parametrize("form", ["beir", "shards", "dataset", "splits"])
def test_other_files_in_the_folder_are_not_read(tmp_path: Path, form: str) -> None:
    folder, rows = tmp_path / "data", Dataset.from_list([{"id": "a", "text": "x"}])
    if form == "dataset":
        rows.save_to_disk(str(folder))
    elif form == "splits":
        DatasetDict({"train": rows, "test": rows}).save_to_disk(str(folder))
    else:
        names = ["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"] if form == "beir" else ["a.jsonl", "b.jsonl"]
        folder_with(folder, *names)
    before = found(folder)
    assert all((folder / name).is_file() for name in before) and not any(name.startswith("test/") for name in before)
    folder_with(folder, ".DS_Store", "._a.jsonl", "notes.txt", "provenance.json", "runs/x/corpus/passages/state.json")
    folder_with(folder, "runs/x/corpus/qrels/test.tsv", "runs/x/a.jsonl", "runs/x/data.arrow", "qrels/.DS_Store")
    assert found(folder) == before


def test_a_damaged_list_of_a_datasets_files_is_named(tmp_path: Path) -> None:
    Dataset.from_list([{"id": "a"}]).save_to_disk(str(tmp_path / "d"))
    for content in ("", "[]", '{"_data_files": 1}', json.dumps({"_data_files": [{}]})):
        (tmp_path / "d" / "state.json").write_text(content, "utf-8")
        with pytest.raises(ValueError, match=rf"^{tmp_path}/d/state.json: .* save the dataset again$"):
            find_sources(tmp_path / "d", "corpus.path")
