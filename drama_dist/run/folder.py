"""Stage folders: finished or partial, made with which settings and from which inputs.

A stage works in RUN/NAME.partial and renames it to RUN/NAME when it is complete. Covers skipping finished stages,
resuming, refusing other settings or a second process at the same time, metrics.jsonl and provenance.json. Does not
cover what a stage does inside its folder, or how it resumes there.
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
from drama_dist.run.files import hash_file, hash_files, sync, write_text
from drama_dist.run.locks import StageLock
from drama_dist.run.progress import say
from drama_dist.run.shares import WHOLE, Share

_PACKAGES = ("drama-dist", "torch", "transformers", "deepspeed", "datasets", "faiss-cpu", "sentence-transformers")
CHECKPOINTS = "checkpoints"  # kept until the stage is finished, then deleted
_LOCKS = ".locks"  # a folder in the run
_RECORDS_OF_THE_RUN = {"provenance.json", "metrics.jsonl", "settings.yaml", "tensorboard", CHECKPOINTS}


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
    def folder(self) -> Path:
        return self.final if self.done else self.run / f"{self.name}.partial"

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
            record = {
                "stage": self.name,
                "fingerprint": fingerprint_of_folder(self.folder),
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
            write_text(self.folder / "provenance.json", json.dumps(record, indent=2) + "\n")
            for path in (self.folder, *self.folder.rglob("*")):
                sync(path)
            self.folder.rename(self.final)
            sync(self.final.parent)  # only what is on the disk may replace the checkpoints
            shutil.rmtree(self.final / CHECKPOINTS, ignore_errors=True)
        ranks.barrier()
        self.done = True
        if self.lock:
            self.lock.release()
        say(f"{self.name}: done in {time.monotonic() - self.began:.0f} s -> {self.final}")
        return self.final


def open_stage(
    run: Path | str, name: str, settings: dict[str, Any], inputs: dict[str, str], share: Share = WHOLE
) -> StageFolder:
    """Open a stage of a run: finished, partial or new.

    settings: every value that the artefact depends on (plain YAML types). inputs: name -> fingerprint of what is read
    (see `fingerprint`). Raises OtherSettings if the run has this artefact, finished or partial, made with others; the
    message lists the differences. Raises InUse if another run is working on the stage; tasks with different shares may
    work side by side.
    """
    stage = StageFolder(Path(run), name, settings, inputs, share=share)
    _find(stage)
    if not _of_rank_0(stage.done):
        stage.lock = StageLock(stage.run / _LOCKS / name, share)
        exists = _of_rank_0(_find(stage))
        if ranks.rank() == 0 and not exists and not _create(stage):
            _refuse_others(stage.folder, stage.record)
        ranks.barrier()
    stage.done = _of_rank_0(stage.done)  # another run may have finished it meanwhile
    if stage.done and ranks.rank() == 0:
        shutil.rmtree(stage.final / CHECKPOINTS, ignore_errors=True)  # left by a kill right after the rename
    if stage.done or stage.resumed:
        _say_once(f"{name}: {'already done' if stage.done else 'resuming'} ({stage.folder})")
    return stage


def refuse_other_settings(run: Path | str, name: str, settings: dict[str, Any]) -> None:
    """Raise OtherSettings if a run has this artefact, finished or partial, made with other settings."""
    for folder in (Path(run) / name, Path(run) / f"{name}.partial"):
        if (folder / "settings.yaml").exists():
            _refuse_others(folder, {"settings": settings})
            return


def fingerprint(path: Path | str) -> str:
    """SHA-256 that identifies an input: a stage's artefact (from its provenance), a folder or a file.

    Raises FileNotFoundError if there is nothing at `path`.
    """
    path = Path(path)
    if (path / "provenance.json").exists():
        return str(json.loads((path / "provenance.json").read_text("utf-8"))["fingerprint"])
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


def inputs_of(folder: Path) -> dict[str, str]:
    """The fingerprints of what a finished artefact was made from."""
    return dict(json.loads((folder / "provenance.json").read_text("utf-8"))["inputs"])


def seconds_of(run: Path | str, name: str) -> float:
    """Wall-clock seconds that a finished stage took."""
    return float(json.loads((Path(run) / name / "provenance.json").read_text("utf-8"))["seconds"])


def _find(stage: StageFolder) -> bool:
    """Whether the stage's folder exists, finished or not; raises OtherSettings."""
    for done in (True, False):
        stage.done = done
        if (stage.folder / "settings.yaml").exists():
            _refuse_others(stage.folder, stage.record)
            stage.resumed = not done
            return True
    return False


def _create(stage: StageFolder) -> bool:
    """Make the folder with settings.yaml in it; False if another process got there first.

    Renaming it into place means that no process sees it without its settings, and that only one of several makes it.
    """
    fresh = stage.folder.with_name(f"{stage.folder.name}.{uuid.uuid4().hex[:8]}")
    fresh.mkdir(parents=True)
    (fresh / "settings.yaml").write_text(yaml.safe_dump(stage.record, sort_keys=False), "utf-8")
    try:
        fresh.rename(stage.folder)
    except OSError:
        shutil.rmtree(fresh)
        if not (stage.folder / "settings.yaml").exists():
            raise
        return False
    return True


def _of_rank_0(flag: bool) -> bool:
    """Rank 0's flag on every rank: ranks may see files at different times."""
    return bool(ranks.on_every_rank(int(flag))[0])


@cache
def _say_once(message: str) -> None:
    say(message)


def _refuse_others(folder: Path, wanted: dict[str, Any]) -> None:
    """Raise OtherSettings if settings.yaml differs, in the parts that `wanted` has."""
    recorded = yaml.safe_load((folder / "settings.yaml").read_text("utf-8"))
    old, new = dict(_flatten({part: recorded[part] for part in wanted})), dict(_flatten(wanted))
    differences = [
        f"  {key}: {old.get(key, '(absent)')!r} in the folder, {new.get(key, '(absent)')!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, "(absent)") != new.get(key, "(absent)")
    ]
    if differences:
        raise OtherSettings(
            f"{folder} was made with other settings or inputs:\n"
            + "\n".join(differences)
            + f"\nUse another run (run=runs/NAME), or delete {folder} and every later stage."
        )


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        return [(prefix, value)]
    return [pair for key, inner in value.items() for pair in _flatten(inner, f"{prefix}.{key}" if prefix else str(key))]


def _step_of(line: str) -> int:
    """0 if the line is incomplete."""
    try:
        return int(json.loads(line)["step"])
    except ValueError:
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
