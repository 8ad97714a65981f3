"""mteb runs an exported model on a task made from a folder, and gives the figures of `drama evaluate`."""

from __future__ import annotations

import importlib
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import passages, write_lines

from drama_dist.corpus.collection import open_collection
from drama_dist.run.runner import make
from drama_dist.settings import Settings

LENGTHS = (6, 90)  # words of a query; the longer are cut at encoder.max_query_tokens=32


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mteb.abstasks.retrieval", None)
    monkeypatch.delitem(sys.modules, "drama_dist.evaluate.mteb_tasks", raising=False)
    with pytest.raises(ImportError, match=r"needs the package mteb: pip install 'drama-dist\[mteb\]'"):
        importlib.import_module("drama_dist.evaluate.mteb_tasks")


def beir_folder(folder: Path) -> Path:
    """64 passages, half of them with titles; 40 queries of their words; grades 2, 1, 0 and -3."""
    chance, rows = random.Random(5), passages()
    for number, row in enumerate(rows[::2]):
        row["title"] = f"TITLE {number}"
    queries, judged = [], ["query-id\tcorpus-id\tscore"]
    for number in range(40):
        right, *others = chance.sample(rows, 4)
        words = [word for row in (right, others[0]) for word in row["text"].split()]
        text = " ".join(chance.choices(words, k=LENGTHS[number % 2]))
        queries.append({"_id": f"q{number}", "text": text})
        judged += [
            f"q{number}\t{row['_id']}\t{grade}" for grade, row in zip((2, 1, 0, -3), (right, *others), strict=True)
        ]
    write_lines(folder / "corpus.jsonl", rows)
    write_lines(folder / "queries.jsonl", queries)
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text("\n".join(judged) + "\n", "utf-8")
    return folder


@pytest.fixture(scope="module")
def run(small_settings_in: Callable[..., Settings], tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A run that is evaluated on the folder, and exported."""
    pytest.importorskip("mteb")
    folder = tmp_path_factory.mktemp("mteb")
    judged = beir_folder(folder / "judged")
    changes = ["evaluate.systems=[drama]", f"evaluate.collections=[{judged}]", "train.steps=2"]
    settings = small_settings_in(folder, *changes, "augment.synthetic_queries=0")
    make(settings, "evaluate")
    make(settings, "export")
    return settings


def ours(run: Settings, collection: str) -> dict[int, dict[str, float]]:
    rows = json.loads((Path(run.run) / "evaluate" / collection / "results.json").read_text("utf-8"))
    return {row["dim"]: row for row in rows}


def theirs(model: Any, task: Any) -> dict[str, float]:
    import mteb

    (result,) = mteb.evaluate(model, task, cache=None, show_progress_bar=False).task_results
    (scores,) = result.scores["test"]
    return scores


def test_mteb_gives_our_figures_at_every_dim(run: Settings) -> None:
    from drama_dist.evaluate.mteb_tasks import model_of_folder, task_of_folder

    task = task_of_folder(run.evaluate.collections[0], run.corpus)
    for dim, row in ours(run, "judged").items():
        scores = theirs(model_of_folder(Path(run.run) / "export", dim), task)
        assert scores["ndcg_at_10"] == pytest.approx(row["ndcg@10"], abs=1e-4), dim
        assert scores["mrr_at_10"] == pytest.approx(row["mrr@10"], abs=1e-4), dim


def test_the_folder_by_sentence_transformers_gives_them_too_and_with_other_prefixes_or_lengths_not(
    run: Settings,
) -> None:
    from sentence_transformers import SentenceTransformer

    from drama_dist.evaluate.mteb_tasks import task_of_folder

    task, right = task_of_folder(run.evaluate.collections[0], run.corpus), ours(run, "judged")[32]["ndcg@10"]
    model = SentenceTransformer(str(Path(run.run) / "export"), device="cpu")
    assert theirs(model, task)["ndcg_at_10"] == pytest.approx(right, abs=1e-4)
    model.prompts = {"query": "", "document": "the river "}
    assert abs(theirs(model, task)["ndcg_at_10"] - right) > 1e-2
    uncut = SentenceTransformer(str(Path(run.run) / "export"), device="cpu")
    uncut[0].query_length = None
    assert abs(theirs(uncut, task)["ndcg_at_10"] - right) > 1e-2


def test_a_runs_own_collection_is_a_task(run: Settings) -> None:
    from drama_dist.evaluate.mteb_tasks import model_of_folder, task_of_collection

    stored = Path(run.run) / "corpus"  # with test queries held out: no folder has them
    task = task_of_collection(open_collection(stored), "held-out", stored, "1")
    scores = theirs(model_of_folder(Path(run.run) / "export"), task)
    assert scores["ndcg_at_10"] == pytest.approx(ours(run, "corpus")[32]["ndcg@10"], abs=1e-4)


def test_names_tell_other_contents_apart(run: Settings, tmp_path: Path) -> None:
    from drama_dist.evaluate.mteb_tasks import model_of_folder, task_of_folder

    folder = beir_folder(tmp_path / "judged")
    before = task_of_folder(folder).metadata
    assert before.name == task_of_folder(run.evaluate.collections[0]).metadata.name
    write_lines(folder / "corpus.jsonl", passages(80))
    after = task_of_folder(folder).metadata
    assert before.name.startswith("judged-") and before.name != after.name and before.revision != after.revision
    meta = model_of_folder(Path(run.run) / "export", 16).mteb_model_meta
    assert meta.name == "drama/run-export-16" and len(meta.revision) == 64


def test_what_is_no_collection_or_no_export_is_refused(run: Settings, tmp_path: Path) -> None:
    from drama_dist.evaluate.mteb_tasks import model_of_folder, task_of_folder

    write_lines(tmp_path / "corpus.jsonl", passages())
    with pytest.raises(ValueError, match=r"no judged queries: expected queries\.jsonl and qrels/test\.tsv"):
        task_of_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="no exported model; make one: drama export"):
        model_of_folder(tmp_path)
