"""The whole job on a tiny model: run, repeat, kill and resume, several ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import drama_dist
from drama_dist.corpus.collection import open_collection
from drama_dist.run.artefact import read_provenance
from drama_dist.run.folder import OtherSettings
from drama_dist.run.runner import make
from drama_dist.search.shards import EmbeddingShards
from drama_dist.settings import Settings, write_settings

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def rows(run: Path) -> list[dict[str, object]]:
    return json.loads((run / "evaluate" / "corpus" / "results.json").read_text("utf-8"))


def steps(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "train" / "metrics.jsonl").read_text("utf-8").splitlines()]


def start(settings: Settings, verb: str = "run") -> subprocess.Popen[str]:
    path = Path(settings.run).with_suffix(".yaml")
    write_settings(settings, path)
    command = [sys.executable, "-m", "drama_dist.cli", verb, str(path)]
    return subprocess.Popen(
        command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def test_a_run_leaves_every_artefact_and_repeating_it_does_nothing(small_settings: Callable[..., Settings]) -> None:
    settings = small_settings("evaluate.systems=[drama,random-init,llm-unpruned,teacher,bm25]")
    run = Path(settings.run)
    make(settings, "run")
    results = {(row["system"], row["dim"]) for row in rows(run)}
    expected = {(system, dim) for system in ("drama", "random-init") for dim in (32, 16)}
    assert results == expected | {("llm-unpruned", 48), ("teacher", 384), ("bm25", None)}
    for stage in ("corpus", "prune", "augment", "train", "encode/corpus/drama", "evaluate/corpus", "export"):
        kept = {path.name for path in (run / stage).iterdir()}
        assert {"settings.yaml", "provenance.json"} <= kept
    assert not list(run.rglob("*.partial")) and not list(run.rglob("*.bin"))
    report = json.loads((run / "report.json").read_text("utf-8"))
    assert report["results"] == rows(run) and report["seconds"]["train"] > 0
    with_texts = ("prune", "train", "encode/corpus/drama", "encode/windows/teacher", "evaluate/corpus")
    cut = {(row["artefact"], row["what"]): row for row in report["texts_cut"]}
    assert {artefact for artefact, _ in cut} >= set(with_texts)
    assert cut["encode/corpus/drama", "passages"]["texts"] == 64 and cut["train", "queries"]["texts"] == 4 * 12
    assert {what for artefact, what in cut if artefact == "evaluate/corpus"} == {
        f"queries of {system}" for system in ("drama", "random-init", "llm-unpruned", "teacher")
    }
    encoder = drama_dist.load(run / "export")
    assert encoder.encode_queries(["the bread"], dim=16).shape == (1, 16)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and "report" not in path.name}
    make(settings, "run")
    after = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and "report" not in path.name}
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert {path.name for path in changed} <= {"settings.yaml"} and all(path.parent == run for path in changed)
    cheaper = ["train.activation_budget=0", "train.checkpoint_layers=true", "train.tensorboard=false"]
    assert (
        make(small_settings(*cheaper), "train") == run / "train"
    )  # these change only the cost, so the run is the same


def test_a_corpus_without_test_queries_is_trained_on_and_exported(
    small_settings: Callable[..., Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = small_settings("corpus.held_out_queries=0", "train.steps=2", "augment.synthetic_queries=0")
    run = Path(settings.run)
    make(settings, "run")
    assert rows(run) == [] and json.loads((run / "report.json").read_text("utf-8"))["results"] == []
    assert "Not evaluated: the collection has no judged queries." in (run / "report.html").read_text("utf-8")
    assert "Not evaluated." in (run / "export" / "README.md").read_text("utf-8")
    assert drama_dist.load(run / "export").encode_queries(["the bread"]).shape == (1, 32)
    assert "evaluate/corpus: the collection has no judged queries" in capsys.readouterr().err


def test_other_settings_for_the_same_run_are_refused(small_settings: Callable[..., Settings]) -> None:
    make(small_settings(), "corpus")
    with pytest.raises(OtherSettings, match=r"corpus.held_out_queries: 12 in the folder, 3 now"):
        make(small_settings("corpus.held_out_queries=3"), "corpus")


def test_another_model_can_be_the_start_and_be_evaluated(small_settings: Callable[..., Settings], llm: Path) -> None:
    settings = small_settings(
        f"train.start={llm}", "encoder.dims=[48,16]", f"evaluate.systems=[drama,model:{llm}]", "train.steps=2"
    )
    make(settings, "run")
    run = Path(settings.run)
    assert not (run / "prune").exists()
    assert [(row["system"], row["dim"]) for row in rows(run)] == [("drama", 48), ("drama", 16), (llm.name, 48)]
    as_it_is = drama_dist.load(llm)
    as_it_is.contract.max_passage_tokens = 256
    expected = as_it_is.encode_passages(open_collection(run / "corpus").passages.contents(range(5)))
    _, first = next(EmbeddingShards(run / "encode" / "corpus" / llm.name).blocks(5))
    np.testing.assert_allclose(first, expected, atol=1e-5)


MOMENTS = (
    "augment.partial/checkpoints/synthetic/part-00000.jsonl",
    "train.partial/checkpoints/step-0000002",
    "encode/corpus/drama.partial/shard-00000.npy",
)


@pytest.mark.parametrize("moments", [MOMENTS[1:2], pytest.param(MOMENTS, marks=pytest.mark.slow)], ids=["train", "all"])
def test_a_run_that_is_killed_ends_with_the_same_table(
    moments: tuple[str, ...], small_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    changes = ["train.steps=40", "encode.shard_passages=1", "augment.generation_batch=1", "augment.max_new_tokens=24"]
    changes += ["train.start_share=0.3"]
    whole, killed = (small_settings(f"run={tmp_path / name}", *changes) for name in ("whole", "killed"))
    beside = start(whole)
    run = Path(killed.run)
    for moment in moments:
        process = start(killed)
        until = time.monotonic() + 120
        while not (run / moment).exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
        process.kill()
        assert process.wait(30) == -signal.SIGKILL, f"not killed at {moment}: {process.communicate()[1]}"
        assert (run / moment).exists()
    last = start(killed)
    messages = last.communicate(timeout=300)[1]
    assert last.returncode == 0, messages
    assert beside.wait(300) == 0
    assert f"{moments[-1].partition('.partial')[0]}: resuming" in messages
    assert rows(run) == rows(Path(whole.run))
    assert [line["step"] for line in steps(run)] == list(range(1, 41))
    assert [line["loss"] for line in steps(run)] == [line["loss"] for line in steps(Path(whole.run))]
    for artefact in ("train", "encode/corpus/drama"):
        assert read_provenance(run / artefact)["cut"] == read_provenance(Path(whole.run) / artefact)["cut"]
    for file in ("augment/examples.jsonl", "augment/set_aside.jsonl", "train/model.safetensors"):
        assert (run / file).read_bytes() == (Path(whole.run) / file).read_bytes(), file


@pytest.mark.parametrize("launcher", ["deepspeed", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_two_ranks_train_as_one_does(launcher: str, small_settings: Callable[..., Settings], tmp_path: Path) -> None:
    changes = ["train.zero_stage=2", "train.steps=6", "train.batch_size=13", "evaluate.systems=[drama]"]
    changes += ["train.start_share=0.3"]
    if launcher == "deepspeed":
        changes += ["train.info_nce_weight=0.5", "train.soft_target_weight=2"]
    single = small_settings(f"run={tmp_path / 'one'}", *changes)
    two = small_settings(f"run={tmp_path / 'two'}", *changes)
    make(single, "augment")
    make(single, "prune")
    shutil.copytree(single.run, two.run)
    make(single, "train")
    saving = [
        "train.zero_stage=3",
        "train.loss_partition=queries",
        "train.checkpoint_layers=true",
        "train.activation_budget=0",
    ]
    extra = saving if launcher == "torchrun" else []
    _train_with_two_ranks(launcher, small_settings(f"run={two.run}", *changes, *extra))
    ours, theirs = steps(Path(two.run)), steps(Path(single.run))
    assert len(ours) == len(theirs) == 6
    for name in ("loss", "gradient_norm", "accuracy", "tokens"):
        np.testing.assert_allclose([s[name] for s in ours], [s[name] for s in theirs], rtol=1e-4, err_msg=name)
    # A margin is the difference of two scores that nearly cancel, over the temperature: what must agree is the scores.
    margins = np.array([[s["margin"] for s in run] for run in (ours, theirs)]) * single.train.temperature
    np.testing.assert_allclose(*margins, rtol=0, atol=1e-5)
    texts = ["the river", "flour and water"]
    np.testing.assert_allclose(
        drama_dist.load(Path(two.run) / "train").encode_queries(texts),
        drama_dist.load(Path(single.run) / "train").encode_queries(texts),
        atol=1e-4,
    )
    assert json.loads((Path(two.run) / "train" / "provenance.json").read_text("utf-8"))["world_size"] == 2


def _train_with_two_ranks(launcher: str, settings: Settings) -> None:
    path = Path(settings.run).with_suffix(".yaml")
    write_settings(settings, path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    programs = Path(sys.executable).parent
    if launcher == "deepspeed":
        command = [str(programs / "deepspeed"), "--num_gpus", "2", "--master_port", str(port)]
    else:
        command = [str(programs / "torchrun"), "--nproc-per-node", "2", "--master-port", str(port)]
    environment = {**ENVIRONMENT, "PATH": f"{programs}:{os.environ['PATH']}"}
    command += ["launcher/train.py", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
