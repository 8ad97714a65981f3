"""Finished artefacts: what provenance.json records of one, and whether its files are still those that were written.

The record names every file with its size and SHA-256, and has a checksum of its own. A file is read again only where
its size or times are not those of the last check, which are noted in RUN/.checked. Does not cover work in progress
(folder.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drama_dist.run.files import hash_file, write_text

PROVENANCE = "provenance.json"
CHECKPOINTS = "checkpoints"  # a folder that is kept until the stage is finished, then deleted
SHARDS = "shard-*.npy"  # the only files that are read because they lie in a folder, and not by their names
_CHECKED = ".checked"  # a folder in the run
_FILES, _SEAL = "files", "sha256"
_ALWAYS_THERE = ("fingerprint", "inputs", "seconds", _FILES, _SEAL)

State = list[int]  # of a file: size in bytes, times of change of its contents and of its entry in nanoseconds


class Damaged(ValueError):
    """A file of a finished artefact is not what was written."""


class FilesOfArtefact:
    """What is recorded of the files of an artefact that is about to be finished."""

    def __init__(self, folder: Path, paths: Sequence[Path]):
        """Read and hash every file. paths: in `folder`."""
        self.states = {path.relative_to(folder): _state(path) for path in paths}
        self.hashes = {name: hash_file(folder / name) for name in self.states}

    def write_record(self, folder: Path, facts: dict[str, Any]) -> None:
        """Write provenance.json: `facts`, the files and the checksum of both."""
        files = {
            name.as_posix(): {"bytes": self.states[name][0], "sha256": sha256} for name, sha256 in self.hashes.items()
        }
        record = {**facts, _FILES: files}
        self._seal = _checksum(record)
        write_text(folder / PROVENANCE, json.dumps({**record, _SEAL: self._seal}, indent=2) + "\n")

    def note_check(self, run: Path, name: str) -> None:
        """Note that the files are as recorded, once they are, and the artefact has its final name."""
        files = {file.as_posix(): state for file, state in self.states.items()}
        _write_note(run, name, {"of": self._seal, "files": files})


def verify(run: Path | str, name: str) -> None:
    """Check that a finished artefact is what was written; only this process, so that under several ranks one does it.

    Raises Damaged, naming the file and what to do.
    """
    run = Path(run)
    folder = run / name
    record = read_provenance(folder)
    last, states = _read_note(run, name), {}
    known = last["files"] if last.get("of") == record[_SEAL] else {}
    for file, written in record[_FILES].items():
        states[file] = _verified(folder, file, written, known.get(file))
    for path in sorted(folder.rglob(SHARDS)):
        inside = path.relative_to(folder)
        if inside.as_posix() not in states and CHECKPOINTS not in inside.parts:  # which a kill may have left
            raise Damaged(f"{path}: no part of the artefact, but it would be read as one; move it away")
    note = {"of": record[_SEAL], "files": states}
    if note != last:
        _write_note(run, name, note)


def read_provenance(folder: Path) -> dict[str, Any]:
    """What is recorded of a finished artefact; raises Damaged where the record is missing or not what was written."""
    path = folder / PROVENANCE
    try:
        record = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise damaged(path, "missing") from None
    except (ValueError, RecursionError):
        raise damaged(path, "not JSON") from None
    if not isinstance(record, dict) or not all(name in record for name in _ALWAYS_THERE):
        raise damaged(path, "not the record of an artefact, or that of an earlier version")
    if record[_SEAL] != _checksum({name: value for name, value in record.items() if name != _SEAL}):
        raise damaged(path, "its contents differ from what was written")
    return record


def fingerprint_of_artefact(folder: Path) -> str:
    """What identifies a finished artefact of this run as the input of another."""
    return str(read_provenance(folder)["fingerprint"])


def inputs_of(folder: Path) -> dict[str, str]:
    """The fingerprints of what a finished artefact was made from."""
    return dict(read_provenance(folder)["inputs"])


def seconds_of(run: Path | str, name: str) -> float:
    """Wall-clock seconds that a finished stage took."""
    return float(read_provenance(Path(run) / name)["seconds"])


def _verified(folder: Path, name: str, written: dict[str, Any], known: State | None) -> State:
    """The file's state, after a look at its contents where it is not the known one."""
    path = folder / name
    try:
        state = _state(path)
    except (FileNotFoundError, NotADirectoryError):
        raise damaged(path, "missing", folder) from None
    if state != known:
        if state[0] != written["bytes"]:
            raise damaged(path, f"it has {state[0]} bytes, and {written['bytes']} were written", folder)
        if hash_file(path) != written["sha256"]:
            raise damaged(path, "its contents differ from what was written", folder)
    return state


def damaged(path: Path, what: str, folder: Path | None = None) -> Damaged:
    """The error that names a damaged file. folder: the artefact's; None: the one that the file lies in."""
    again = "make it again with `drama run` and the run's settings"
    return Damaged(f"{path}: damaged ({what}); delete the folder {folder or path.parent} and {again}")


def _state(path: Path) -> State:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _checksum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


def _note_path(run: Path, name: str) -> Path:
    return run / _CHECKED / f"{name}.json"


def _read_note(run: Path, name: str) -> dict[str, Any]:
    """The note of the last check; empty where there is none that can be read."""
    try:
        note = json.loads(_note_path(run, name).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return note if isinstance(note, dict) and isinstance(note.get("files"), dict) else {}


def _write_note(run: Path, name: str, note: dict[str, Any]) -> None:
    """Replace the note; where the run cannot be written to, the next start reads the files again."""
    path = _note_path(run, name)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")  # tasks of an array may check at once
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(note), "utf-8")
        temporary.replace(path)
