"""Stage folders: finished or partial, made with which settings and from which inputs.

A stage works in RUN/NAME.partial and renames it to RUN/NAME when it is complete. Covers skipping finished stages,
resuming, refusing other settings or a second process at the same time, giving way where no work would be lost, and
metrics.jsonl. Does not cover what a stage does inside its folder, how it resumes there, or whether a finished artefact
is still what was written (artefact.py).
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from drama_dist.distributed import ranks
from drama_dist.run.artefact import CHECKPOINTS, PROVENANCE, SHARDS, FilesOfArtefact, damaged, verify
from drama_dist.run.files import combined_hash, hash_file, hash_files, sync, write_text
from drama_dist.run.locks import StageLock
from drama_dist.run.progress import say
from drama_dist.run.shares import WHOLE, Share

_PACKAGES = ("drama-dist", "torch", "transformers", "deepspeed", "datasets", "faiss-cpu", "sentence-transformers")
_LOCKS = ".locks"  # a folder in the run
_SETTINGS = "settings.yaml"
_RECORDS_OF_THE_RUN = {PROVENANCE, "metrics.jsonl", _SETTINGS, "tensorboard", CHECKPOINTS}
DISCARD = "--discard-partial"


class OtherSettings(ValueError):
    """A run holds an artefact that was made with other settings or inputs."""


@dataclass
class StageFolder:
    """One stage of one run.

    folder: where to work, and where the artefact is read (RUN/NAME.partial until finished).
    done: the artefact is complete and was made with these settings and inputs.
    resumed: an earlier attempt left partial work in `folder`.
    share: of the work, in a task of an array job; only a run of the whole finishes the stage.
    """

    run: Path
    name: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    done: bool = False
    resumed: bool = False
    share: Share = WHOLE
    began: float = field(default_factory=time.monotonic)
    lock: StageLock | None = None

    @property
    def record(self) -> dict[str, Any]:
        """What the artefact depends on, as stored in its settings.yaml."""
        return {"settings": self.settings, "inputs": self.inputs}

    @property
    def final(self) -> Path:
        return self.run / self.name

    @property
    def partial(self) -> Path:
        return self.run / f"{self.name}.partial"

    @property
    def folder(self) -> Path:
        return self.final if self.done else self.partial

    def log(self, **values: Any) -> None:
        """Append a line to metrics.jsonl (rank 0 only)."""
        if ranks.rank() == 0:
            with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as out:
                out.write(json.dumps(values) + "\n")

    def forget_metrics_after(self, step: int) -> None:
        """Drop the lines that an interrupted attempt wrote after the step it resumes from."""
        path = self.folder / "metrics.jsonl"
        if ranks.rank() == 0 and path.exists():
            lines = [line for line in path.read_text("utf-8").splitlines() if 0 < _step_of(line) <= step]
            write_text(path, "".join(line + "\n" for line in lines))

    def finish(self, **facts: Any) -> Path:
        """Write provenance.json with `facts`, rename the folder to its final name and return its path."""
        ranks.barrier()
        if ranks.rank() == 0:
            for left in (PROVENANCE, f"{PROVENANCE}.tmp"):  # by an attempt that was killed right here
                (self.folder / left).unlink(missing_ok=True)
            kept = _without_checkpoints(self.folder)
            files = FilesOfArtefact(self.folder, [path for path in kept if path.is_file()])
            made = {name: each for name, each in files.hashes.items() if _RECORDS_OF_THE_RUN.isdisjoint(name.parts)}
            record = {
                "stage": self.name,
                "fingerprint": combined_hash(made),
                "inputs": self.inputs,
                "seconds": round(time.monotonic() - self.began, 2),
                "resumed": self.resumed,
                "world_size": ranks.world_size(),
                "command": sys.argv,
                "git": _git_commit(),
                "python": platform.python_version(),
                "versions": {name: _version(name) for name in _PACKAGES},
                **facts,
            }
            files.write_record(self.folder, record)
            for path in (self.folder, *kept):
                sync(path)
            self.folder.rename(self.final)
            sync(self.final.parent)  # only what is on the disk may replace the checkpoints
            shutil.rmtree(self.final / CHECKPOINTS, ignore_errors=True)
            files.note_check(self.run, self.name)
        ranks.barrier()
        self.done = True
        if self.lock:
            self.lock.release()
        say(f"{self.name}: done in {time.monotonic() - self.began:.0f} s -> {self.final}")
        return self.final


def open_stage(
    run: Path | str,
    name: str,
    settings: dict[str, Any],
    inputs: dict[str, str],
    share: Share = WHOLE,
    discard_partial: bool = False,
) -> StageFolder:
    """Open a stage of a run: finished, partial or new.

    settings: every value that the artefact depends on (plain YAML types). inputs: name -> fingerprint of what is read.
    A partial folder that was made with others gives way if no attempt could resume from what is in it, or with
    discard_partial. Raises OtherSettings if it does not, or if the artefact is finished, and was made with others; the
    message lists the differences. Raises Damaged if the finished artefact is not what was written, InUse if another run
    is working on the stage; tasks with different shares may work side by side.
    """
    stage = StageFolder(Path(run), name, settings, inputs, share=share)
    stage.done = bool(ranks.by_rank_0(lambda: _is_finished(stage)))
    if not stage.done:
        stage.lock = StageLock(stage.run / _LOCKS / name, share)
        stage.done = bool(ranks.by_rank_0(lambda: _is_finished(stage)))  # another run may have finished it meanwhile
        stage.resumed = bool(ranks.by_rank_0(lambda: not stage.done and _take_over(stage, discard_partial)))
    if stage.done and ranks.rank() == 0:
        shutil.rmtree(stage.final / CHECKPOINTS, ignore_errors=True)  # left by a kill right after the rename
    if stage.done or stage.resumed:
        _say_once(f"{name}: {'already done' if stage.done else 'resuming'} ({stage.folder})")
    return stage


def refuse_what_is_there(run: Path | str, name: str, settings: dict[str, Any], discard_partial: bool = False) -> None:
    """Raise what `open_stage` would raise of an artefact with these settings, before its inputs are there.

    Only this process looks, so that under several ranks one does it.
    """
    stage = StageFolder(Path(run), name, settings, {})
    wanted = {"settings": settings}
    if not _is_finished(stage, wanted) and stage.partial.exists():
        differences = _differences(stage.partial, wanted)
        if differences and not discard_partial and (work := _work_in(stage.partial)):
            raise _kept(stage.partial, differences, work)


def fingerprint(path: Path | str) -> str:
    """SHA-256 of what a file or a folder from anywhere contains; the records of a run in it do not count.

    Raises FileNotFoundError if there is nothing at `path`.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found; run the stage that makes it, or fix the path in the settings")
    return fingerprint_of_folder(path) if path.is_dir() else hash_file(path)


def fingerprint_of_folder(folder: Path) -> str:
    """SHA-256 over names and contents of all files except the stage's records."""
    paths = [path for path in folder.rglob("*") if _RECORDS_OF_THE_RUN.isdisjoint(path.relative_to(folder).parts)]
    return hash_files(folder, [path for path in paths if path.is_file()])


def fingerprint_of_files(paths: Sequence[Path]) -> str:
    """SHA-256 over contents and names, relative to the common folder, of some files; missing ones are left out."""
    common = Path(os.path.commonpath([path.parent for path in paths]))
    return hash_files(common, [path for path in paths if path.is_file()])


def _is_finished(stage: StageFolder, wanted: dict[str, Any] | None = None) -> bool:
    """Whether the run has the artefact; raises Damaged, or OtherSettings if it was made with others than `wanted`."""
    if not stage.final.is_dir() or not any(stage.final.iterdir()):
        return False
    verify(stage.run, stage.name)
    differences = _differences(stage.final, wanted or stage.record)
    if differences is None:
        raise damaged(stage.final / _SETTINGS, "not what a stage writes")
    if differences:
        raise _other(
            stage.final, differences, f"use another run (run=runs/NAME), or delete {stage.final} and every later stage"
        )
    return True


def _take_over(stage: StageFolder, discard: bool) -> bool:
    """Whether there is a partial folder to resume from; if not, there is a new one.

    Raises OtherSettings if there is one that was made with others and is kept.
    """
    if stage.partial.exists():
        differences = _differences(stage.partial, stage.record)
        if differences == []:
            return True
        _give_way(stage, differences, discard)
    # Where it cannot be made, a task with another share got there first.
    return False if _create(stage) else _take_over(stage, discard)


def _give_way(stage: StageFolder, differences: list[str] | None, discard: bool) -> None:
    """Delete a partial folder that was made with other settings or inputs; raises OtherSettings where it is kept."""
    assert stage.lock
    work = _work_in(stage.partial)
    if not stage.share.whole:
        todo = "tasks with --share delete nothing: delete that folder before they start, or use another run"
        raise _other(stage.partial, differences, todo)
    if not stage.lock.excludes:
        todo = "this file system has no locks: make sure that nothing else works in that folder, and delete it"
        raise _other(stage.partial, differences, todo)
    if work and not discard:
        raise _kept(stage.partial, differences, work)
    shutil.rmtree(stage.partial)
    held = work or "nothing to resume from"
    say(f"{stage.name}: starts anew: {stage.partial} was made with other settings or inputs, and held {held}")


def _create(stage: StageFolder) -> bool:
    """Make the folder with settings.yaml in it; False if another process got there first.

    Renaming it into place means that no process sees it without its settings, and that only one of several makes it.
    """
    fresh = stage.partial.with_name(f"{stage.partial.name}.{uuid.uuid4().hex[:8]}")
    fresh.mkdir(parents=True)
    write_text(fresh / _SETTINGS, yaml.safe_dump(stage.record, sort_keys=False))
    try:
        fresh.rename(stage.partial)
    except OSError:
        shutil.rmtree(fresh)
        if not stage.partial.exists():
            raise
        return False
    return True


@cache
def _say_once(message: str) -> None:
    say(message)


def _without_checkpoints(folder: Path) -> list[Path]:
    """Everything in the folder, also in folders in it, but the checkpoints."""
    return [path for path in folder.rglob("*") if CHECKPOINTS not in path.relative_to(folder).parts]


def _differences(folder: Path, wanted: dict[str, Any]) -> list[str] | None:
    """Lines on where settings.yaml differs, in the parts that `wanted` has; None where it cannot be read."""
    try:
        recorded = yaml.safe_load((folder / _SETTINGS).read_text("utf-8"))
        old, new = dict(_flatten({part: recorded[part] for part in wanted})), dict(_flatten(wanted))
    except (FileNotFoundError, yaml.YAMLError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return [
        f"  {key}: {old.get(key, '(absent)')!r} in the folder, {new.get(key, '(absent)')!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, "(absent)") != new.get(key, "(absent)")
    ]


def _work_in(partial: Path) -> str:
    """What an attempt could resume from, in words; empty where there is nothing."""
    names = [path.name.removeprefix("step-") for path in (partial / CHECKPOINTS).glob("step-*")]
    steps = [int(name) for name in names if name.isdigit()]
    parts = sum(1 for _ in (partial / CHECKPOINTS).glob("*/part-*.jsonl"))
    shards = sum(1 for _ in partial.glob(SHARDS))
    found = [f"checkpoints up to step {max(steps)}"] if steps else []
    found += [
        f"{count} {what}{'s' * (count > 1)}" for count, what in ((parts, "stored part"), (shards, "shard")) if count
    ]
    return " and ".join(found)


def _kept(partial: Path, differences: list[str] | None, work: str) -> OtherSettings:
    todo = f"use another run (run=runs/NAME), go back to those settings, or add {DISCARD} to give up the {work} in it"
    return _other(partial, differences, todo)


def _other(folder: Path, differences: list[str] | None, todo: str) -> OtherSettings:
    lines = [f"  {_SETTINGS} in it is missing or damaged"] if differences is None else differences
    return OtherSettings(
        "\n".join([f"{folder} was made with other settings or inputs:", *lines, f"{todo[0].upper()}{todo[1:]}."])
    )


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        return [(prefix, value)]
    return [pair for key, inner in value.items() for pair in _flatten(inner, f"{prefix}.{key}" if prefix else str(key))]


def _step_of(line: str) -> int:
    """0 if the line is incomplete."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError):
        return 0


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    try:
        source = Path(__file__).parent
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=source, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return git.stdout.strip() or None
