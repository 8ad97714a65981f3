"""Suites: what they have, what is missing of them, their tables, and a made-up one on one rank and on two."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import passages, write_lines
from kills import differences

from drama_dist.cli import main
from drama_dist.corpus import fetch
from drama_dist.corpus.stage import collection_sections
from drama_dist.distributed import ranks
from drama_dist.evaluate.stage import sections
from drama_dist.evaluate.suite import figures_of, suite_table
from drama_dist.run.graph import artefacts_of, order_of
from drama_dist.run.runner import make
from drama_dist.settings import Settings, SettingsError, write_settings
from drama_dist.suites import MADE, MEMBERS, SUITES, Suite

ROOT = Path(__file__).parent.parent.parent
TOPICS = {"bread": 20, "engine": 12, "river": 16}  # collections of the made-up suite, and their queries


def write_collection(folder: Path, topic: str, count: int, own: bool = False) -> Path:
    """60 passages, and queries of words of them, each with one relevant passage. own: queries are passages themselves,
    and the next one is relevant."""
    chance, rows = random.Random(topic), [row for row in passages(240) if row["_id"].startswith(topic)]
    queries, judged = [], ["query-id\tcorpus-id\tscore"]
    for number in chance.sample(range(len(rows) - 1), count):
        text = rows[number]["text"]
        query = rows[number] if own else {"_id": f"q{number}", "text": " ".join(chance.sample(text.split(), 6))}
        queries.append({"_id": query["_id"], "text": query["text"]})
        judged.append(f"{query['_id']}\t{rows[number + own]['_id']}\t1")
    write_lines(folder / "corpus.jsonl", rows)
    write_lines(folder / "queries.jsonl", queries)
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text("\n".join(judged) + "\n", "utf-8")
    return folder


@pytest.fixture
def toy(tmp_path: Path, small_settings: Callable[..., Settings], llm: Path) -> Path:
    """A settings file for a made-up suite; nothing is trained."""
    for topic, count in TOPICS.items():
        write_collection(tmp_path / "toy" / topic, topic, count)
    path = tmp_path / "toy.yaml"
    systems = f"evaluate.systems=[model:{llm},bm25]"
    write_settings(small_settings(f"evaluate.suite={tmp_path / 'toy'}", systems, f"run={tmp_path / 'one'}"), path)
    return path


def test_a_folder_of_collections_is_a_suite_in_one_command(toy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(toy)]) == 0
    printed, run = capsys.readouterr().out, toy.parent / "one"
    lines = [line.split() for line in printed.splitlines()]
    assert lines[1] == ["collection", "queries", "tiny-llama-48", "bm25", "p"]
    assert [line[:2] for line in lines[3:]] == [
        *([name, str(count)] for name, count in TOPICS.items()),
        ["average", "48"],
    ]
    of_collections = [json.loads((run / f"evaluate/{name}/results.json").read_text("utf-8")) for name in TOPICS]
    for column, system in ((2, 0), (3, 1)):
        values = [rows[system]["ndcg@10"] for rows in of_collections]
        assert [line[column] for line in lines[3:]] == [f"{value:.3f}" for value in (*values, np.mean(values))]
    kept = json.loads((run / "suites" / "toy.json").read_text("utf-8"))
    assert suite_table(kept) + "\n" == printed and kept["paper"] == {}
    assert (run / "suites" / "toy.md").read_text("utf-8") == suite_table(kept, markdown=True) + "\n"
    assert main(["evaluate", str(toy)]) == 0  # nothing is left to do, and the table comes again
    assert capsys.readouterr().out == printed


@pytest.mark.slow
def test_two_ranks_that_are_killed_and_start_again_write_the_bytes_of_one(toy: Path) -> None:
    assert start(toy, "one", 1).wait(300) == 0
    started = start(toy, "two", 2)
    partial = toy.parent / "two" / "encode" / "engine" / "tiny-llama.partial"
    while not partial.exists():
        assert started.poll() is None, "it ended before it could be killed"
        time.sleep(0.001)
    for process in [started, *started.children(recursive=True)]:
        process.send_signal(signal.SIGKILL)
    assert started.wait(60) == -signal.SIGKILL and partial.exists()
    assert not (toy.parent / "two" / "suites").exists()
    assert start(toy, "two", 2).wait(300) == 0
    one, two = (toy.parent / run for run in ("one", "two"))
    assert differences(one, two, "evaluate/river") == []
    assert json.loads((two / "encode/river/tiny-llama/provenance.json").read_text("utf-8"))["world_size"] == 2
    (two / "suites" / "toy.json").write_text("{}", "utf-8")
    assert differences(one, two, "evaluate/river") == ["suites/toy.json: other bytes"]


def start(settings: Path, run: str, count: int) -> psutil.Popen:
    """`drama evaluate` of one rank, or of several under torchrun."""
    programs = Path(sys.executable).parent
    several = [str(programs / "torchrun"), "--nproc-per-node", str(count), "--master-port", str(ranks._free_port())]
    command = [*(several if count > 1 else [sys.executable]), "launcher/evaluate.py", str(settings)]
    own = {*ranks.VARIABLES, "MASTER_ADDR", "MASTER_PORT"}
    environment = {name: value for name, value in os.environ.items() if name not in own}
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return psutil.Popen(
        [*command, f"run={settings.parent / run}"], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    )


def write_evaluation(folder: Path, values: dict[str, list[float]]) -> Path:
    """What the evaluate stage writes of systems, each at one dim, and the second of them without vectors."""
    rows = []
    for number, (system, of_queries) in enumerate(values.items()):
        dim = None if number == 1 else 8
        rows.append({"system": system, "dim": dim, "ndcg@10": float(np.mean(of_queries))})
        by_query = {f"q{query}": value for query, value in enumerate(of_queries)}
        path = folder / (system if dim is None else f"{system}-{dim}")
        write_lines(path.with_name(f"{path.name}.ndcg.json"), [by_query])  # type: ignore[list-item]
    (folder / "results.json").write_text(json.dumps(rows), "utf-8")
    return folder


def test_each_collection_counts_equally_in_the_average_and_in_its_p(tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    sizes = {"small": 3, "large": 8}
    values = {
        name: {system: list(chance.random(size)) for system in ("teacher", "bm25", "drama")}
        for name, size in sizes.items()
    }
    figures = figures_of("made-up", {name: write_evaluation(tmp_path / name, of) for name, of in values.items()}, 1)
    assert figures["baseline"] == "drama-8"  # which is not the first
    average, pooled = figures["average"]["ndcg@10"]["bm25"], [value for of in values.values() for value in of["bm25"]]
    assert average == pytest.approx(np.mean([np.mean(of["bm25"]) for of in values.values()]))
    assert abs(average - np.mean(pooled)) > 1e-3
    differences_of = [(np.array(of["drama"]) - of["bm25"]) / len(of["bm25"]) for of in values.values()]
    weighted = np.concatenate(differences_of)
    signs = np.array(list(itertools.product((-1, 1), repeat=len(weighted))))  # all of them: the exact test
    exact = float((np.abs(signs @ weighted) >= abs(weighted.sum()) - 1e-12).mean())
    assert figures["average"]["p"]["bm25"] == pytest.approx(exact, abs=0.02)
    assert set(figures["average"]["p"]) == {"teacher-8", "bm25"}
    assert [row["queries"] for row in figures["collections"]] == [3, 8]


def test_of_a_made_suite_the_share_of_queries_whose_passage_is_first_is_shown(tmp_path: Path) -> None:
    values = {"drama": [1.0, 0.63, 1.0, 0.0], "bm25": [1.0, 1.0, 1.0, 0.5]}
    evaluated = {"needle-256": write_evaluation(tmp_path / "a", values)}
    figures = figures_of("needle", evaluated, 1)
    assert figures["measure"] == "accuracy@1" and "ndcg@10" not in figures["average"]
    assert figures["average"]["accuracy@1"] == {"drama-8": 0.5, "bm25": 0.75}
    assert suite_table(figures).startswith("needle: accuracy@1, average over collections; p against drama-8")
    assert figures_of(str(tmp_path), evaluated, 1)["average"]["ndcg@10"] == pytest.approx(
        {"drama-8": 0.6575, "bm25": 0.875}
    )


def test_made_collections_are_evaluated_like_any_other_and_nothing_is_missing_or_fetched(
    small_settings: Callable[..., Settings], tmp_path: Path, llm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "_hindrance", lambda dataset: pytest.fail("nothing is to be fetched"))
    two = ["passkey/passkey-256", "passkey/passkey-512"]
    for name in ("passkey/passkey-1024", "passkey/passkey-2048", "passkey/passkey-4096", "passkey/passkey-8192"):
        monkeypatch.delitem(MADE, name)
    path = tmp_path / "made.yaml"
    systems = f"evaluate.systems=[model:{llm},bm25]"
    settings = small_settings(
        "evaluate.suite=passkey", systems, "evaluate.collections=[passkey/passkey-512,needle/needle-256]"
    )
    assert list(settings.evaluate.collection_labels.values()) == [two[1], "needle/needle-256", two[0]]
    assert settings.evaluate.suite_labels == ["passkey-512", "passkey-256"]
    write_settings(settings, path)
    assert main(["evaluate", str(path)]) == 0
    run = Path(settings.run)
    figures = json.loads((run / "suites" / "passkey.json").read_text("utf-8"))
    assert [row["queries"] for row in figures["collections"]] == [100, 100]
    assert figures["average"]["accuracy@1"]["bm25"] == 1  # the name is in no other passage
    assert figures["average"]["accuracy@1"]["tiny-llama-48"] < 0.5  # with random weights
    rows = json.loads((run / "evaluate" / "needle-256" / "results.json").read_text("utf-8"))
    assert [row["system"] for row in rows] == ["tiny-llama", "bm25"] and rows[1]["ndcg@10"] > 0.5


def test_without_drama_the_first_system_is_the_baseline(tmp_path: Path) -> None:
    values = {"drama-base": [0.5, 0.1], "bm25": [0.5, 0.1]}  # a model of that name is not drama
    figures = figures_of("x", {"a": write_evaluation(tmp_path / "a", {"teacher": [0.0, 1.0], **values})}, 1)
    assert figures["baseline"] == "teacher-8"
    same = figures_of("x", {"a": write_evaluation(tmp_path / "b", values)}, 1)
    assert same["average"]["p"] == {"bm25": 1.0}


def test_the_named_suites_are_the_papers() -> None:
    assert [len(suite.members) for suite in SUITES.values()] == [13, 18, 13] and len(MEMBERS) == 44
    assert SUITES["beir"].paper["drama-base (0.1B)"] == 0.569


def test_the_named_suites_are_as_mteb_has_them() -> None:
    mteb = pytest.importorskip("mteb")
    for member in MEMBERS.values():
        task = mteb.get_task(member.task)
        assert task.metadata.dataset["path"] == member.dataset
        assert member.subset in task.hf_subsets and member.split in task.eval_splits
        assert task.ignore_identical_ids == member.own_left_out, member
    for suite, task in (("miracl", "MIRACLRetrieval"), ("mldr", "MultiLongDocRetrieval")):
        assert {member.subset for member in SUITES[suite].members} == set(mteb.get_task(task).hf_subsets)


def test_what_is_missing_is_listed_with_where_it_comes_from_and_goes(
    small_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = [f"evaluate.suite_path={tmp_path}", "evaluate.systems=[bm25]"]
    write_collection(tmp_path / "beir" / "scifact", "river", 5)
    monkeypatch.setattr(fetch, "_hindrance", lambda dataset: "mteb is not installed")
    beir = small_settings(*changes, "evaluate.suite=beir")
    with pytest.raises(SettingsError) as raised:
        make(beir, "evaluate")
    head, *lines = str(raised.value).splitlines()
    assert head.startswith(
        "evaluate.suite=beir: 12 of 13 collections are not there, and cannot be fetched: mteb is not"
    )
    assert f"evaluate.suite={tmp_path / 'beir'} takes those that are" in head and len(lines) == 12
    assert lines[1] == f"  {tmp_path}/beir/nfcorpus: {MEMBERS['nfcorpus'].archive}"
    assert not Path(beir.run).exists()
    with pytest.raises(
        SettingsError, match=r"miracl-ar: https://hugging\S+/mteb/MIRACLRetrieval \(subset ar, split dev\)"
    ):
        make(small_settings(*changes, "evaluate.suite=miracl"), "evaluate")
    make(small_settings(*changes, f"evaluate.suite={tmp_path / 'beir'}"), "evaluate")


def test_what_is_no_suite_is_refused(small_settings: Callable[..., Settings], tmp_path: Path) -> None:
    empty, mixed = tmp_path / "empty", tmp_path / "mixed"
    empty.mkdir()
    write_collection(mixed / "bread", "bread", 5)
    write_lines(mixed / "notes" / "corpus.jsonl", passages())
    for suite, message in (
        (
            "bier",
            "must be beir, miracl, mldr, passkey, needle, a folder of collections' folders, or names with commas",
        ),
        (str(empty), "has no folders; expected one for each collection"),
        (str(mixed), f"evaluate.suite: {mixed / 'notes'}: no judged queries"),
    ):
        settings = small_settings(f"evaluate.suite={suite}", "evaluate.systems=[bm25]")
        with pytest.raises(ValueError, match=message):
            make(settings, "evaluate")
        assert not Path(settings.run).exists()


def test_a_suite_stands_beside_collections_and_before_the_report(
    small_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    for name in ("a", "b"):
        (tmp_path / "toy" / name).mkdir(parents=True)
    named = f"evaluate.collections=[data/a,{tmp_path}/toy/b]"
    settings = small_settings(named, f"evaluate.suite={tmp_path}/toy")
    labels = settings.evaluate.collection_labels
    assert list(labels.values()) == ["data/a", f"{tmp_path}/toy/b", f"{tmp_path}/toy/a"]  # each once
    assert set(settings.evaluate.suite_labels) == set(labels) - {"a"}  # the name was taken
    order = [artefact.name for artefact in order_of(settings, *artefacts_of(settings, "run"))]
    assert order.index("evaluate/b") < order.index("suite") < order.index("report") == len(order) - 1
    assert "suite" not in artefacts_of(small_settings(named), "run")


def test_members_are_read_in_their_language_whatever_the_corpus_is_in(small_settings: Callable[..., Settings]) -> None:
    paths = ["miracl/miracl-ar", "beir/nq", "other/nq", "mine"]
    settings = small_settings("corpus.language=sw", "corpus.text_keys=[body]", f"evaluate.collections={paths}")
    read = {
        path: collection_sections(settings, label)["corpus"]
        for label, path in settings.evaluate.collection_labels.items()
    }
    assert [read[path]["language"] for path in paths] == ["ar", "en", "sw", "sw"]
    assert [read[path]["text_keys"] == ["body"] for path in paths] == [False, False, True, True]


def test_a_member_under_another_label_is_one_still_and_a_folder_named_twice_is_one(
    small_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    own = small_settings(
        "evaluate.collections=[mine/arguana]", "evaluate.suite=beir", f"evaluate.suite_path={tmp_path}"
    )
    label = next(label for label, path in own.evaluate.collection_labels.items() if path == f"{tmp_path}/beir/arguana")
    assert label != "arguana" and sections(own, label)["own_passage"] == "left out"
    assert "own_passage" not in sections(own, "arguana")
    twice = small_settings("evaluate.collections=[./suites/beir/arguana]", "evaluate.suite=beir")
    assert len(twice.evaluate.collection_labels) == len(twice.evaluate.suite_labels) == 13


def test_by_mteb_members_are_fetched_scored_as_their_suite_does_and_stand_beside_the_papers_figures(
    small_settings: Callable[..., Settings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """mteb's tasks are local ones of the same form: no hub is reached here."""
    mteb = pytest.importorskip("mteb")
    from drama_dist.evaluate.mteb_tasks import task_of_folder

    members = MEMBERS["scifact"], MEMBERS["arguana"]
    origins = {
        "SciFact": write_collection(tmp_path / "origin", "river", 12),
        "ArguAna": write_collection(tmp_path / "own", "bread", 12, own=True),
    }
    asked: list[dict[str, Any]] = []

    def get_task(name: str, **part: Any) -> Any:
        asked.append({"name": name, **part})
        return task_of_folder(origins[name])

    monkeypatch.setattr(mteb, "get_task", get_task)
    monkeypatch.setattr(fetch, "_hindrance", lambda dataset: None)
    monkeypatch.setitem(SUITES, "beir", Suite(members, SUITES["beir"].paper))
    suites = tmp_path / "suites"
    same = f"evaluate.collections=[{origins['SciFact']},{origins['ArguAna']}]"
    settings = small_settings("evaluate.suite=beir", f"evaluate.suite_path={suites}", same, "evaluate.systems=[bm25]")
    make(settings, "evaluate")
    assert asked == [
        {"name": name, "hf_subsets": ["default"], "eval_splits": ["test"]} for name in ("SciFact", "ArguAna")
    ]
    results = {
        name: json.loads((Path(settings.run) / f"evaluate/{name}/results.json").read_text("utf-8"))[0]
        for name in ("scifact", "origin", "arguana", "own")
    }
    assert results["scifact"] == results["origin"]
    assert results["arguana"]["mrr@10"] > results["own"]["mrr@10"] > 0  # where the query itself comes first
    runs = Path(settings.run) / "evaluate"
    for name, finds_itself in (("own", True), ("arguana", False)):
        hits = [line.split() for line in (runs / name / "bm25.trec").read_text("utf-8").splitlines()]
        assert any(query == passage for query, _, passage, *_ in hits) == finds_itself
        assert {hits[0][0]: 20} == {hits[0][0]: sum(hit[0] == hits[0][0] for hit in hits)}  # evaluate.depth
    table = capsys.readouterr().out
    assert "the paper's average: drama-base (0.1B) 0.569, drama-large (0.3B) 0.580, drama-1b 0.591" in table
    assert [line.split()[0] for line in table.splitlines()[3:6]] == ["scifact", "arguana", "average"]
    assert sorted(path.name for path in (suites / "beir").iterdir()) == ["arguana", "scifact"]


def test_a_fetch_that_fails_leaves_nothing_and_says_why(
    small_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(member: Any) -> Any:
        raise ConnectionError("the hub went away")

    monkeypatch.setattr(fetch, "_hindrance", lambda dataset: None)
    monkeypatch.setattr(fetch, "_load", load)
    settings = small_settings("evaluate.suite=beir", f"evaluate.suite_path={tmp_path}/s", "evaluate.systems=[bm25]")
    with pytest.raises(SettingsError, match=r"cannot be fetched: mteb/trec-covid: the hub went away\. Put them there"):
        make(settings, "evaluate")
    assert not (tmp_path / "s").exists()
