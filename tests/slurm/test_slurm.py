"""Jobs on a real slurm of two nodes: they train as two local ranks do, and what is interrupted ends the same."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from drama_dist.distributed import ranks
from drama_dist.run.folder import fingerprint
from drama_dist.run.runner import make
from drama_dist.run.submit import submit
from drama_dist.settings import Settings, write_settings

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parent.parent.parent
TESTBED = Path(__file__).with_name("testbed.sh")
PROGRAMS = Path(sys.executable).parent
PATIENCE = 900  # seconds for one job, on a busy machine
FAILED = {"FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE"}
STEPS = 40
CHANGES = [
    "train.zero_stage=2",
    f"train.steps={STEPS}",
    f"train.checkpoint_every={STEPS}",
    "train.batch_size=13",
    "evaluate.systems=[drama]",
    "encode.shard_passages=1",
    "slurm.nodes=2",
    "slurm.array=4",
    "slurm.minutes=30",
]


@pytest.fixture(scope="module", autouse=True)
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The test bed, running; jobs inherit the environment."""
    folder = tmp_path_factory.mktemp("bed")
    _testbed("install")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PATH", f"{PROGRAMS}:{os.environ['PATH']}")
        patch.chdir(ROOT)
        try:
            _testbed("start", str(folder))
            yield
        finally:
            _testbed("stop", str(folder))


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory, small_settings_in: Callable[..., Settings]) -> Settings:
    """A run in which everything before training is done."""
    settings = small_settings_in(tmp_path_factory.mktemp("examples"), *CHANGES)
    make(settings, "augment")
    make(settings, "prune")
    return settings


@pytest.fixture(scope="module")
def trained(examples: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run trained here by two ranks."""
    settings = _copy(examples, tmp_path_factory.mktemp("trained") / "run")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(PROGRAMS / "torchrun"), "--nproc-per-node", "2", "--master-port", str(port)]
    done = subprocess.run([*command, "launcher/train.py", str(_file(settings))], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return Path(settings.run)


def test_two_nodes_train_as_two_local_ranks_do(examples: Settings, trained: Path, tmp_path: Path) -> None:
    settings = _copy(examples, tmp_path / "run")
    jobs = _submit(settings, "train")
    _wait_for(jobs, settings)
    assert _facts(jobs[0])[0]["NumNodes"] == "2"
    _assert_same_training(Path(settings.run), trained)


def test_srun_by_hand_starts_the_same_program(examples: Settings, trained: Path, tmp_path: Path) -> None:
    settings = _copy(examples, tmp_path / "run")
    words = ["srun", "--nodes=2", "--ntasks=2", sys.executable, "launcher/train.py", str(_file(settings))]
    own = {*ranks.VARIABLES, "MASTER_PORT"}  # of this process, which has been a rank by now
    environment = {name: value for name, value in os.environ.items() if name not in own}
    environment["MASTER_ADDR"] = "127.0.0.1"  # the bed's nodes have no names of their own
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    _assert_same_training(Path(settings.run), trained)


@pytest.mark.parametrize("how", ["warning", "requeue"])
def test_a_preempted_job_requeues_and_ends_with_the_same_weights(
    how: str, examples: Settings, trained: Path, tmp_path: Path
) -> None:
    settings = _copy(examples, tmp_path / "run")
    run = Path(settings.run)
    (job,) = _submit(settings, "train")
    _wait_until((run / "train.partial" / "metrics.jsonl").exists, "a step of training")
    if how == "warning":  # what slurm does before the time limit
        subprocess.run(["scancel", "--signal=USR1", "--batch", job], check=True)
    else:
        subprocess.run(["scontrol", "requeue", job], check=True)
    _wait_for([job], settings)
    assert _facts(job)[0]["Restarts"] == "1"
    assert "train: resuming" in _logs(settings)
    if how == "warning":
        assert "resuming from step" in _logs(settings)  # no other checkpoint was due
    _assert_same_training(run, trained)


def test_an_array_with_a_killed_task_ends_with_the_whole_index(
    examples: Settings, trained: Path, tmp_path: Path
) -> None:
    settings = _copy(examples, tmp_path / "run", trained)
    settings.slurm = replace(settings.slurm, tasks_per_node=2)  # ranks inside each task
    shards, encode = _submit(settings, "encode")
    folder = Path(settings.run) / "encode" / "corpus" / "drama.partial"
    log = Path(settings.run) / "slurm" / f"encode-corpus-drama-array-{shards}_1.log"
    _wait_until(lambda: log.exists() and "corpus: already done" in log.read_text("utf-8"), "the beginning of task 1")
    subprocess.run(["scontrol", "requeue", f"{shards}_1"], check=True)
    _wait_until(lambda: "PENDING" in {task["JobState"] for task in _facts(f"{shards}_1")}, "the end of task 1")
    own = [number for number in range(64) if number // 2 % 4 == 1]  # two ranks in each of four tasks
    assert not all((folder / f"shard-{number:05d}.npy").exists() for number in own)
    _wait_for([shards, encode], settings)
    assert sorted(task["Restarts"] for task in _facts(shards)) == ["0", "0", "0", "1"]
    local = _copy(examples, tmp_path / "local", trained)
    assert fingerprint(folder.with_suffix("")) == fingerprint(make(local, "encode"))


def test_a_warned_last_task_of_an_array_comes_back_alone(examples: Settings, trained: Path, tmp_path: Path) -> None:
    """Its job number is that of the whole array."""
    settings = _copy(examples, tmp_path / "run", trained)
    shards, encode = _submit(settings, "encode")
    log = Path(settings.run) / "slurm" / f"encode-corpus-drama-array-{shards}_3.log"
    _wait_until(lambda: log.exists() and "corpus: already done" in log.read_text("utf-8"), "the beginning of task 3")
    subprocess.run(["scancel", "--signal=USR1", "--batch", f"{shards}_3"], check=True)
    _wait_for([shards, encode], settings)
    restarts = {task["ArrayTaskId"]: task["Restarts"] for task in _facts(shards)}
    assert restarts == {"0": "0", "1": "0", "2": "0", "3": "1"}
    local = _copy(examples, tmp_path / "local", trained)
    assert fingerprint(Path(settings.run) / "encode" / "corpus" / "drama") == fingerprint(make(local, "encode"))


def test_the_whole_run_ends_with_the_table_of_a_local_run(
    examples: Settings, trained: Path, small_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = small_settings(*CHANGES)
    _wait_for(_submit(settings, "run"), settings)
    local = _copy(examples, tmp_path / "local", trained)
    make(local, "run")
    results = [json.loads((Path(one.run) / "report.json").read_text("utf-8"))["results"] for one in (settings, local)]
    assert results[0] == results[1]
    assert (Path(settings.run) / "export" / "provenance.json").exists()


def test_a_cancelled_job_does_not_come_back(examples: Settings, tmp_path: Path) -> None:
    settings = _copy(examples, tmp_path / "run")
    (job,) = _submit(settings, "train")
    _wait_until((Path(settings.run) / "train.partial").exists, "the beginning of training")
    subprocess.run(["scancel", job], check=True)
    _wait_until(lambda: _facts(job)[0]["JobState"] == "CANCELLED", "the end of the job")
    time.sleep(8)  # longer than a requeued job waits
    assert _facts(job)[0]["JobState"] == "CANCELLED" and not (Path(settings.run) / "train").exists()


@pytest.mark.parametrize("stage", ["run", "augment", "train", "encode"])
def test_what_a_dry_run_prints_is_accepted(
    stage: str, small_settings: Callable[..., Settings], capsys: pytest.CaptureFixture[str]
) -> None:
    everything = ["slurm.partition=all", "slurm.cpus_per_task=2", "slurm.gpus_per_node=2", "slurm.tasks_per_node=2"]
    for script in _printed(small_settings(*CHANGES, *everything, "slurm.options=[--mem=0]"), stage, capsys):
        done = _test_only(script)
        assert done.returncode == 0 and "to start at" in done.stderr, done.stderr
    for script in _printed(small_settings(*CHANGES, "slurm.partition=none"), stage, capsys):
        assert "invalid partition" in _test_only(script).stderr


def _printed(settings: Settings, stage: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    submit(settings, stage, ["settings.yaml"], dry_run=True)
    head = "#!/bin/bash\n"
    first, *scripts = capsys.readouterr().out.split(head)
    assert not first and scripts
    return [head + script for script in scripts]


def _test_only(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True)


def _testbed(*words: str) -> None:
    done = subprocess.run([TESTBED, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr


def _copy(settings: Settings, run: Path, of: Path | None = None) -> Settings:
    """The settings for a copy of their run (or of the run `of`)."""
    shutil.copytree(of or settings.run, run)
    copied = Settings(**{**vars(settings), "run": str(run)})
    _file(copied)
    return copied


def _file(settings: Settings) -> Path:
    path = Path(settings.run).with_suffix(".yaml")
    write_settings(settings, path)
    return path


def _submit(settings: Settings, stage: str) -> list[str]:
    return submit(settings, stage, [str(_file(settings))], dry_run=False)


def _facts(job: str) -> list[dict[str, str]]:
    """What slurm says of a job, or of each task of an array."""
    command = ["scontrol", "--oneliner", "show", "job", job]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in shown.splitlines() if line]


def _wait_until(reached: Callable[[], bool], what: str, pause: float = 0.005) -> None:
    until = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < until, f"waited in vain for {what}"
        time.sleep(pause)


def _wait_for(jobs: list[str], settings: Settings) -> None:
    """Wait until all jobs have ended well."""

    def ended(job: str) -> bool:
        states = {task["JobState"] for task in _facts(job)}
        assert not states & FAILED, f"job {job}: {states}\n{_logs(settings)}"
        return states == {"COMPLETED"}

    for job in jobs:
        _wait_until(lambda job=job: ended(job), f"job {job}", pause=0.5)


def _logs(settings: Settings) -> str:
    """The ends of all jobs' logs."""
    paths = sorted((Path(settings.run) / "slurm").glob("*.log"))
    return "\n".join(f"== {path.name}\n{path.read_text('utf-8')[-3000:]}" for path in paths)


def _assert_same_training(run: Path, reference: Path) -> None:
    losses = [
        [json.loads(line)["loss"] for line in (folder / "train" / "metrics.jsonl").read_text("utf-8").splitlines()]
        for folder in (run, reference)
    ]
    assert len(losses[0]) == STEPS and losses[0] == losses[1]
    weights = [(folder / "train" / "model.safetensors").read_bytes() for folder in (run, reference)]
    assert weights[0] == weights[1]
