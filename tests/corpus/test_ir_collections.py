"""Collections of ir_datasets: a data set of local files that is registered with the library."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from beir import judgements, lines, write_beir
from conftest import write_lines

from drama_dist.corpus.collection import open_collection
from drama_dist.run.runner import make
from drama_dist.settings import Settings, SettingsError


@pytest.fixture
def ir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library with a data set own/toy/test of local files, with titles as BEIR's, and one without judgements."""
    library = pytest.importorskip("ir_datasets", reason="needs the extra ir-datasets")
    from ir_datasets.datasets.base import Dataset
    from ir_datasets.datasets.beir import BeirTitleDoc
    from ir_datasets.formats import TrecQrels, TsvDocs, TsvQueries
    from ir_datasets.util import LocalDownload

    monkeypatch.setenv("DRAMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("IR_DATASETS_HOME", str(tmp_path / "ir"))
    queries = write_beir(tmp_path / "same")
    rows = lines((tmp_path / "same/corpus.jsonl").read_text("utf-8"))
    rows = [{**row, "title": row["text"].split()[1]} for row in rows]
    write_lines(tmp_path / "same/corpus.jsonl", rows)
    judgements(tmp_path / "same/qrels/test.tsv", *(f"{query['_id']}\t{query['_id']}\t1" for query in queries))
    texts = {
        "docs.tsv": [f"{row['_id']}\t{row['text']}\t{row['title']}" for row in rows],
        "queries.tsv": [f"{query['_id']}\t{query['text']}" for query in queries],
        "qrels.txt": [f"{query['_id']} 0 {query['_id']} 1" for query in queries],
    }
    for name, of in texts.items():
        (tmp_path / name).write_text("".join(f"{line}\n" for line in of), "utf-8")
    documents = TsvDocs(LocalDownload(tmp_path / "docs.tsv"), doc_cls=BeirTitleDoc, lang="sw")
    asked = TsvQueries(LocalDownload(tmp_path / "queries.tsv"))
    judged = TrecQrels(LocalDownload(tmp_path / "qrels.txt"), {})
    registered = {"own/toy": Dataset(documents), "own/toy/test": Dataset(documents, asked, judged)}
    for name, data in {**registered, "own/queries": Dataset(asked)}.items():
        monkeypatch.setitem(library.registry._registered, name, None)  # taken out again behind the test
        del library.registry._registered[name]
        library.registry.register(name, data)
    return library


def test_ir_datasets_gives_what_the_same_folder_gives(
    ir: Any, small_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    names = f"evaluate.collections=[ir_datasets:own/toy/test,{tmp_path}/same]"
    settings = small_settings(names, "evaluate.systems=[bm25]", "corpus.path=ir_datasets:own/toy", "corpus.language=sw")
    make(settings, "evaluate")
    run = Path(settings.run)
    results = [(run / f"evaluate/{label}/results.json").read_bytes() for label in ("own-toy-test", "same")]
    assert results[0] == results[1] and json.loads(results[0])[0]["ndcg@10"] > 0.2
    read = open_collection(run / "collections/own-toy-test")
    assert read.passages[0].title == "bread" and read.passages[0].text.startswith("The bread number 0")
    assert read.passages[0].language == "sw" and len(read.queries) == 15
    assert len(open_collection(run / "corpus").passages) == 60
    (tmp_path / "docs.tsv").unlink()  # and it is not read again
    make(small_settings(names, "evaluate.systems=[bm25]", f"run={tmp_path}/two"), "evaluate")


def test_what_ir_datasets_lacks_is_said(
    ir: Any, small_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(name: str, message: str) -> None:
        settings = small_settings(f"evaluate.collections=[{name}]")
        with pytest.raises(SettingsError, match=message):
            make(settings, "run")
        assert not Path(settings.run).exists()

    refused("ir_datasets:own/toy/tset", "has no data set own/toy/tset; did you mean own/toy/test")
    refused("ir_datasets:own/queries", "own/queries of ir_datasets has no passages")
    refused("ir_datasets:own/toy", "has no queries with judgements, so nothing can be evaluated on it")
    monkeypatch.setitem(sys.modules, "ir_datasets", None)
    refused("ir_datasets:own/toy/test", r"cannot be fetched: .*pip install 'drama-dist\[ir-datasets\]'")
    monkeypatch.undo()


def test_sources_of_ir_datasets_that_cannot_be_fetched_end_the_run_before_training(
    ir: Any, small_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    (tmp_path / "docs.tsv").unlink()
    settings = small_settings("evaluate.collections=[ir_datasets:own/toy/test]")
    with pytest.raises(SettingsError, match=r"own/toy/test: is not in \S+own--toy--test, and cannot be fetched: File"):
        make(settings, "run")
    assert [path.name for path in Path(settings.run).glob("[a-z]*") if path.is_dir()] == ["corpus"]
