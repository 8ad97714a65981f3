"""A stage's folder: what is done, what is half done, with which settings, from which inputs.

A stage works in RUN/NAME.partial and renames it to RUN/NAME when whole. Covers skipping,
resuming, refusing other settings and a second run at the same time, metrics.jsonl and provenance.json. What a stage
does inside its folder, and how it resumes there, is its own affair.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from drama_dist.distributed import ranks
from drama_dist.run.locks import StageLock
from drama_dist.run.progress import say
from drama_dist.run.shares import WHOLE, Share

_PACKAGES = ("drama-dist", "torch", "transformers", "deepspeed", "datasets", "faiss-cpu", "sentence-transformers")
CHECKPOINTS = "checkpoints"  # what a stage keeps only until it is finished, and no shorter
_LOCKS = ".locks"  # a folder of the run
_RECORDS_OF_THE_RUN = {"provenance.json", "metrics.jsonl", "settings.yaml", "tensorboard", CHECKPOINTS}


class OtherSettings(ValueError):
    """A run folder holds an artefact that was made with other settings or inputs."""


@dataclass
class StageFolder:
    """One stage of one run.

    folder: where to work and to read the artefact (RUN/NAME.partial until finished).
    done: the artefact is whole and was made with these settings and inputs.
    resumed: an earlier attempt left a part in `folder`.
    """

    run: Path
    name: str
    settings: dict[str, Any]
    inputs: dict[str, str]
    done: bool = False
    resumed: bool = False
    began: float = field(default_factory=time.monotonic)
    lock: StageLock | None = None

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
        """Drop the lines that an interrupted attempt wrote past the step it resumes from."""
        path = self.folder / "metrics.jsonl"
        if ranks.rank() == 0 and path.exists():
            lines = [line for line in path.read_text("utf-8").splitlines() if 0 < _step_of(line) <= step]
            write_text(path, "".join(line + "\n" for line in lines))

    def finish(self, **facts: Any) -> Path:
        """Write provenance.json with `facts`, rename the folder to its final name, return that."""
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
            self.folder.rename(self.final)
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
    """Open a stage of a run: finished, half done, or new.

    settings: every value that the artefact depends on (plain YAML types). inputs: name ->
    fingerprint of what is read (see `fingerprint`). Raises OtherSettings where the folder holds
    this stage's artefact, or a part of it, made with others; the message lists the differences. Raises InUse where
    processes of another start work on the stage; tasks with shares may, beside each other.
    """
    stage = StageFolder(Path(run), name, settings, inputs)
    _find(stage)
    if not _of_rank_0(stage.done):
        stage.lock = StageLock(stage.run / _LOCKS / name.replace("/", "-"), share)
        found = _of_rank_0(_find(stage))
        if ranks.rank() == 0 and not found and not _create(stage):
            _refuse_others(stage)
        ranks.barrier()
    stage.done = _of_rank_0(stage.done)  # another start may have finished meanwhile
    if stage.done and ranks.rank() == 0:
        shutil.rmtree(stage.final / CHECKPOINTS, ignore_errors=True)  # killed in its last moment
    if stage.done or stage.resumed:
        _say_once(f"{name}: {'already done' if stage.done else 'going on from what is there'} ({stage.folder})")
    return stage


def fingerprint(path: Path | str) -> str:
    """SHA-256 that identifies an input: a stage's artefact (from its provenance), a folder or a file.

    Raises FileNotFoundError, saying so, where there is nothing at `path`.
    """
    path = Path(path)
    if (path / "provenance.json").exists():
        return str(json.loads((path / "provenance.json").read_text("utf-8"))["fingerprint"])
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found; run the stage that makes it, or correct the path in the settings")
    return fingerprint_of_folder(path) if path.is_dir() else _hash_file(path)


def fingerprint_of_folder(folder: Path) -> str:
    """SHA-256 over names and contents of all files but the stage's own records."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and _RECORDS_OF_THE_RUN.isdisjoint(path.relative_to(folder).parts):
            total.update(f"{path.relative_to(folder)}\0{_hash_file(path)}\n".encode())
    return total.hexdigest()


def seconds_of(run: Path | str, name: str) -> float:
    """Wall seconds that a finished stage took."""
    return float(json.loads((Path(run) / name / "provenance.json").read_text("utf-8"))["seconds"])


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name, then rename: whole or not there."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, "utf-8")
    temporary.replace(path)


def sync(path: Path) -> None:
    """Wait until the contents of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _find(stage: StageFolder) -> bool:
    """Whether the stage's folder is there, finished or not; raises OtherSettings."""
    for done in (True, False):
        stage.done = done
        if (stage.folder / "settings.yaml").exists():
            _refuse_others(stage)
            stage.resumed = not done
            return True
    return False


def _create(stage: StageFolder) -> bool:
    """Make the folder with settings.yaml in it; False where another process was faster.

    It is renamed into place, so that whoever sees the folder sees the settings, and one of several processes makes it.
    """
    fresh = stage.folder.with_name(f"{stage.folder.name}.{uuid.uuid4().hex[:8]}")
    fresh.mkdir(parents=True)
    record = {"settings": stage.settings, "inputs": stage.inputs}
    (fresh / "settings.yaml").write_text(yaml.safe_dump(record, sort_keys=False), "utf-8")
    try:
        fresh.rename(stage.folder)
    except OSError:
        shutil.rmtree(fresh)
        if not (stage.folder / "settings.yaml").exists():
            raise
        return False
    return True


def _of_rank_0(flag: bool) -> bool:
    """Ranks may see files at different times."""
    return bool(ranks.on_every_rank(int(flag))[0])


@cache
def _say_once(message: str) -> None:
    say(message)


def _refuse_others(stage: StageFolder) -> None:
    found = yaml.safe_load((stage.folder / "settings.yaml").read_text("utf-8"))
    wanted = {"settings": stage.settings, "inputs": stage.inputs}
    old, new = dict(_flatten(found)), dict(_flatten(wanted))
    differences = [
        f"  {key}: {old.get(key, '(absent)')!r} in the folder, {new.get(key, '(absent)')!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, "(absent)") != new.get(key, "(absent)")
    ]
    if differences:
        raise OtherSettings(
            f"{stage.folder} was made with other settings or inputs:\n"
            + "\n".join(differences)
            + f"\nName another run (run=runs/NAME), or delete {stage.folder} and every later stage."
        )


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        return [(prefix, value)]
    return [pair for key, inner in value.items() for pair in _flatten(inner, f"{prefix}.{key}" if prefix else str(key))]


def _step_of(line: str) -> int:
    """0 where the line was not written to its end."""
    try:
        return int(json.loads(line)["step"])
    except ValueError:
        return 0


def _hash_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    try:
        here = Path(__file__).parent
        answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
