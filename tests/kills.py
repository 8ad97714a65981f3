"""Trials of being stopped: two ranks are stopped at a random moment, started again, and compared to the byte.

python tests/kills.py [--trials 36] [--seed 1] [--add]: benchmarks/results/kills.md. test_kills.py runs the same trials.

A trial takes a whole run of the tiny model, removes one stage, starts that on two ranks, waits until it is at work and
then a random part of the time that it takes, stops it, and starts it again until it ends well. Ways to stop it: kill -9
of one rank, of the ranks' launcher, or of every process; SIGTERM to that launcher; a disk that is full; folders that
cannot be written to. The last two end when the stage has failed of them. The full disk needs root, for a file system
of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from drama_dist.distributed import ranks
from drama_dist.settings import read_settings, write_settings

ROOT = Path(__file__).parent.parent
STAGES = {  # of a trial: the verb that runs it, and its folder
    "masks": ("masks", "masks"),
    "prune": ("prune", "prune"),
    "augment": ("augment", "augment"),
    "train": ("train", "train"),
    "encode": ("encode", "encode/corpus/drama"),
    "index": ("encode", "encode/corpus/drama"),
}
WAYS = ("rank", "launcher", "everything", "SIGTERM", "full disk", "read-only folders")
LAUNCHERS = ("torchrun", "deepspeed")
CHANGES = [
    "prune.mask_steps=40",
    "prune.heal_steps=40",
    "augment.synthetic_queries=48",
    "augment.generation_batch=4",
    "augment.rerank=12",
    "train.steps=30",
    "train.checkpoint_every=3",
    "encode.shard_passages=4",
]
SHARDS = 16
DISK_BYTES = 256 << 20
PATIENCE = 180.0  # seconds in which a stopped stage must be gone
_OWN_RECORDS = {
    "provenance.json",
    "metrics.jsonl",
    "tensorboard",
    "settings.yaml",
    ".locks",
    ".checked",
}  # dates, pids, places


@dataclass(frozen=True)
class Trial:
    """What is stopped, how, under which launcher; the seed chooses the moment and the rank."""

    stage: str
    way: str
    launcher: str
    seed: int


@dataclass
class Outcome:
    """share: of the stage's time, when it was stopped; starts: how many it took to end well afterwards.

    step: from which the last start went on; None where the stage has no steps, or none was saved.
    """

    share: float
    status: int
    starts: int
    step: int | None
    differences: list[str]


def trials(count: int, seed: int, ways: tuple[str, ...] = WAYS) -> list[Trial]:
    """Every stage in every way, as often as `count` allows, under both launchers in turn."""
    pairs = [(stage, way) for way in ways for stage in STAGES]
    return [
        Trial(*pairs[number % len(pairs)], LAUNCHERS[(number + number // len(pairs)) % 2], seed + number)
        for number in range(count)
    ]


class Ground:
    """A folder with a whole run of the tiny model, where trials take place. settings: the file that tells of it."""

    def __init__(self, folder: Path, settings: Path, log: Path):
        self.folder, self.settings, self.whole, self._log = folder, settings, folder / "whole", log
        for verb, _ in dict.fromkeys(STAGES.values()):
            self._finish(self.whole, verb, "torchrun")

    def take(self, trial: Trial) -> Outcome:
        """Stop and start again; raises TimeoutError where what was stopped does not end."""
        chance = random.Random(trial.seed)
        family: list[Any] = []
        while not _ranks(family):  # until the moment comes before the stage's end
            share = chance.random()
            run = self._run_without(trial.stage)
            started = self._start(run, STAGES[trial.stage][0], trial.launcher)
            if self._await_moment(trial, run, started, share):
                family = [started, *started.children(recursive=True)]
        with self._hindrance(trial.way, run) as meanwhile:
            _stop(trial.way, family, chance)
            self._await_end(trial, family, meanwhile)
        starts = self._finish(run, STAGES[trial.stage][0], trial.launcher)
        found = differences(self.whole, run, STAGES[trial.stage][1])
        outcome = Outcome(share, started.wait(), starts, self._went_on(), found)
        shutil.rmtree(run)
        return outcome

    def _run_without(self, stage: str) -> Path:
        run = self.folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(self.whole, run)
        shutil.rmtree(run / STAGES[stage][1])
        return run

    def _start(self, run: Path, verb: str, launcher: str) -> psutil.Popen:
        programs = Path(sys.executable).parent
        start = {
            "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port", str(ranks._free_port())],
            "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", str(ranks._free_port())],
        }[launcher]
        command = [str(programs / start[0]), *start[1:], f"launcher/{verb}.py", str(self.settings), f"run={run}"]
        inherited = {name: value for name, value in os.environ.items() if name not in (*ranks.VARIABLES, "MASTER_PORT")}
        environment = {
            **inherited,
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{programs}:{os.environ['PATH']}",
        }
        with open(self._log, "w", encoding="utf-8") as log:
            return psutil.Popen(
                [*_obeying_permissions(), *command], cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT
            )

    def _await_moment(self, trial: Trial, run: Path, started: psutil.Popen, share: float) -> bool:
        """False where the stage ended before."""
        folder = STAGES[trial.stage][1]
        partial = run / f"{folder}.partial"
        seconds = json.loads((self.whole / folder / "provenance.json").read_text("utf-8"))["seconds"]

        def at_work() -> bool:
            return partial.exists() if trial.stage != "index" else len(list(partial.glob("shard-*.npy"))) == SHARDS

        while not at_work():
            if started.poll() is not None:
                return False
            time.sleep(0.001)
        time.sleep(share * (seconds if trial.stage != "index" else 0.05))
        return started.poll() is None and partial.exists()

    def _hindrance(self, way: str, run: Path) -> contextlib.AbstractContextManager[Callable[[], None]]:
        """What lies in the stage's way; gives what keeps it there."""
        if way == "full disk":
            return _full_disk(self.folder / "filler")
        return _read_only(run) if way == "read-only folders" else contextlib.nullcontext(lambda: None)

    def _await_end(self, trial: Trial, family: list[Any], meanwhile: Callable[[], None]) -> None:
        deadline = time.monotonic() + PATIENCE
        while any(map(_alive, family)):
            meanwhile()
            if time.monotonic() > deadline:
                for process in filter(_alive, family):
                    process.kill()
                raise TimeoutError(f"{trial}: still there after {PATIENCE:.0f} s:\n{self._messages()}")
            time.sleep(0.05)

    def _finish(self, run: Path, verb: str, launcher: str) -> int:
        """Start until it ends well; returns how often."""
        for start in range(1, 4):
            if self._start(run, verb, launcher).wait(PATIENCE) == 0:
                return start
        raise RuntimeError(f"{verb} does not end well:\n{self._messages()}")

    def _went_on(self) -> int | None:
        found = re.search(r"resuming from step (\d+)", self._log.read_text("utf-8"))
        return int(found[1]) if found else None

    def _messages(self) -> str:
        return self._log.read_text("utf-8")[-4000:]


def differences(whole: Path, run: Path, folder: str) -> list[str]:
    """What is not as in the run that nobody stopped: files, their bytes, and the losses of each step."""
    names, own = _names(whole), _names(run)
    found = [f"{name}: left behind" for name in sorted(own - names)]
    found += [f"{name}: missing" for name in sorted(names - own)]
    found += [f"{name}: other bytes" for name in sorted(names & own) if _differ(whole / name, run / name)]
    metrics = [one / folder / "metrics.jsonl" for one in (whole, run)]
    if metrics[0].exists() and _steps(metrics[0]) != _steps(metrics[1]):
        found.append(f"{folder}/metrics.jsonl: other steps or losses")
    return found


def _names(run: Path) -> set[Path]:
    """All files and folders of a run, but what has its date in its name or in itself."""
    found = (path.relative_to(run) for path in run.rglob("*"))
    return {name for name in found if _OWN_RECORDS.isdisjoint(name.parts)}


def _differ(one: Path, other: Path) -> bool:
    return one.is_file() and one.read_bytes() != other.read_bytes()


def _steps(metrics: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
    return [(row["step"], row["loss"]) for row in rows]


def _stop(way: str, family: list[Any], chance: random.Random) -> None:
    """Send the signal, if it is one."""
    ranked = _ranks(family)
    launcher = [process for process in family if process.pid == ranked[0].ppid()]  # deepspeed has another above it
    chosen = {"rank": [chance.choice(ranked)], "launcher": launcher, "everything": family, "SIGTERM": launcher}
    chosen |= {"full disk": [], "read-only folders": []}
    for process in filter(_alive, chosen[way]):
        process.send_signal(signal.SIGTERM if way == "SIGTERM" else signal.SIGKILL)


@contextlib.contextmanager
def _read_only(run: Path) -> Iterator[Callable[[], None]]:
    folders = [path for path in [run, *run.rglob("*")] if path.is_dir()]
    for folder in folders:
        folder.chmod(0o500)
    try:
        yield lambda: None
    finally:
        for folder in folders:
            folder.chmod(0o700)


@contextlib.contextmanager
def _full_disk(filler: Path) -> Iterator[Callable[[], None]]:
    try:
        with open(filler, "wb", buffering=0) as file:
            _write_until_full(file.fileno())
            yield lambda: _write_until_full(file.fileno())  # what they free
    finally:
        filler.unlink()


def _ranks(family: list[Any]) -> list[Any]:
    """The processes that a launcher gave a rank, without their own children."""
    ranked = {process.pid: process for process in family if _has_rank(process)}
    with contextlib.suppress(psutil.NoSuchProcess):
        return [process for process in ranked.values() if process.ppid() not in ranked]
    return []


def _has_rank(process: Any) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        return "LOCAL_RANK" in process.environ()
    return False


def _alive(process: Any) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _obeying_permissions() -> list[str]:
    """Root may write into folders that nobody may write to, unless it gives that right up."""
    return ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"] if os.getuid() == 0 else []


def _write_until_full(file: int) -> None:
    size = 1 << 20
    while size:
        try:
            os.write(file, bytes(size))
        except OSError:
            size //= 2


@contextlib.contextmanager
def ground() -> Iterator[Ground]:
    """Where trials take place: a file system of its own, which can be full, where this user may make one."""
    from conftest import SMALL, passages, save_llama, train_tokenizer, write_lines

    with tempfile.TemporaryDirectory() as folder, _own_disk(Path(folder) / "disk") as place:
        shape = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2}
        llm = save_llama(place / "llm", train_tokenizer(), **shape)
        corpus = write_lines(place / "passages.jsonl", passages())
        settings = place / "small.yaml"
        settings.write_text(f"run: {place / 'whole'}\nllm: {llm}\n{SMALL}", "utf-8")
        write_settings(read_settings(settings, [f"corpus.path={corpus}", *CHANGES]), settings)
        yield Ground(place, settings, Path(folder) / "log")


@contextlib.contextmanager
def _own_disk(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    if not can_fill():
        yield folder
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def can_fill() -> bool:
    """Whether this user may mount a small file system."""
    return os.getuid() == 0 and shutil.which("mount") is not None


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "Two ranks, float32. moment: share of the stage's time. status: of the stopped launcher. starts: until it",
        "ended well. same: all files of the artefact to the byte, every step's loss, nothing left behind. status 0:",
        "the stage was too far on to be hindered, or its deepspeed command does not tell that a child was killed.",
        "",
        "| trial | stage | stopped by | launcher | moment | status | starts | from step | same |",
        "|--:|---|---|---|--:|--:|--:|--:|---|",
    ]
    for number, row in enumerate(rows, 1):
        same = "yes" if not row["differences"] else "; ".join(row["differences"])
        lines.append(
            f"| {number} | {row['stage']} | {row['way']} | {row['launcher']} | {row['share']:.2f} | {row['status']} "
            f"| {row['starts']} | {'–' if row['step'] is None else row['step']} | {same} |"
        )
    starts = Counter((row["date"], row["machine"], row["torch"], row["command"], row["trials"]) for row in rows)
    lines += ["", "Date, machine, torch, command, trials that ended and that were asked for:", ""]
    lines += [f"- {', '.join(facts[:4])}: {ended} of {facts[4]}" for facts, ended in sorted(starts.items())]
    return "\n".join(lines)


def main() -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from measure import circumstances, earlier_rows, write_results
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--trials", type=int, default=36)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--add", action="store_true", help="keep the results file's trials")
    options = parser.parse_args()
    facts, rows = circumstances(), earlier_rows("kills") if options.add else []
    start = {
        "date": facts["date"],
        "machine": facts["machine"]["processor"],
        "torch": facts["versions"]["torch"],
        "command": facts["command"],
        "trials": options.trials,
    }
    possible = tuple(way for way in WAYS if can_fill() or way != "full disk")
    with ground() as place:
        for trial in tqdm(trials(options.trials, options.seed, possible), unit=" trials"):
            rows.append({**start, **vars(trial), **vars(place.take(trial))})
            path = write_results("kills", facts, rows, table(rows))
    print(table(rows), path, sep="\n")


if __name__ == "__main__":
    main()
