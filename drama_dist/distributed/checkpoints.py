"""Checkpoints of a training run: written beside the training, whole or not there, checked before they are used.

Each rank writes the pieces of tensors that it holds; a checkpoint is the folder `step-N` with a safetensors file and
a record (checksum, where each piece lies) of every rank, and state.json. Another number of ranks, or another ZeRO
stage, reads the same folder. Covers writing in the background, checking, choosing and dropping checkpoints. What
the tensors are is engine.py's affair.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from drama_dist.distributed import ranks
from drama_dist.run.progress import say

_PATIENCE = 600.0  # seconds that rank 0 waits for the others' files
_STATE = "state.json"


class CheckpointError(OSError):
    """A checkpoint could not be written; training must not go on as if it were."""


@dataclass(frozen=True)
class Piece:
    """Some consecutive components of a tensor of a shape, from component `begin` of the flattened whole."""

    values: torch.Tensor
    begin: int
    shape: tuple[int, ...]


class Checkpoints:
    """The checkpoints of one stage; all ranks make every call. keep: how many of the newest stay, beside the best."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self._writer: threading.Thread | None = None
        self._error: Exception | None = None
        self._copies: dict[str, torch.Tensor] = {}  # used again: new memory takes longer than the copy itself

    def save(self, step: int, pieces: Mapping[str, Piece], **facts: Any) -> None:
        """Copy this rank's pieces and return; they are written in the background.

        facts: kept in state.json; "loss" decides which checkpoint is the best. Raises CheckpointError where the
        checkpoint before this one could not be written.
        """
        self.wait()
        copied = {
            name: Piece(self._copy(name, piece.values), piece.begin, piece.shape) for name, piece in pieces.items()
        }
        given = step, copied, {"step": step, **facts}, ranks.rank(), ranks.world_size()
        # A daemon: it must not hold up the end of a process whose other ranks are gone.
        self._writer = threading.Thread(target=self._try_to_write, args=given, daemon=True)
        self._writer.start()

    def wait(self) -> None:
        """Until what is being written is whole; raises CheckpointError, on all ranks, where one of them failed."""
        if self._writer is None:
            return
        self._writer.join()
        self._writer = None
        failed = [rank for rank, is_so in enumerate(ranks.on_every_rank(int(self._error is not None))) if is_so]
        if failed:
            reason = self._error or f"rank {failed[0]} failed; its message says why"
            raise CheckpointError(f"{self.folder}: the checkpoint could not be written: {reason}") from self._error

    def clear_unfinished(self) -> None:
        """Drop what a killed attempt left half written."""
        if ranks.rank() == 0:
            for path in self.folder.glob("step-*.tmp"):
                shutil.rmtree(path)
        ranks.barrier()

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole; what is damaged is named and passed over."""
        step = -1
        if ranks.rank() == 0:
            for path in reversed(self.whole()):
                damage = _damage(path)
                if damage is None:
                    step = _step(path)
                    break
                say(f"{damage}; going back to the checkpoint before it")
        step = ranks.on_every_rank(step)[0]
        return None if step < 0 else self._path(step)

    def whole(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if path.suffix != ".tmp")

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:07d}"

    def _copy(self, name: str, values: torch.Tensor) -> torch.Tensor:
        kept = self._copies.get(name)
        if kept is None or kept.shape != values.shape:
            kept = self._copies[name] = torch.empty(values.shape, dtype=values.dtype)
        return kept.copy_(values.detach())

    def _try_to_write(self, *given: Any) -> None:
        try:
            self._write(*given)
        except Exception as error:  # whatever it is, the training's own thread raises it
            self._error = error

    def _write(self, step: int, pieces: dict[str, Piece], facts: dict[str, Any], rank: int, size: int) -> None:
        final = self._path(step)
        folder = final.with_name(f"{final.name}.tmp")
        folder.mkdir(parents=True, exist_ok=True)
        _write_rank(folder, rank, pieces)
        if rank == 0:
            _until(lambda: all(_record(folder, other).exists() for other in range(size)), folder)
            records = [_checksum(_record(folder, other)) for other in range(size)]
            state = json.dumps({**facts, "world_size": size, "records": records})
            _write_synced(folder / _STATE, json.dumps({"state": state, "sha256": _sha256(state)}).encode())
            shutil.rmtree(final, ignore_errors=True)  # damaged, or it would have been resumed from
            folder.rename(final)
            _sync(self.folder)
            self._drop_old(step)

    def _drop_old(self, step: int) -> None:
        found = self.whole()
        for path in found:
            if _step(path) > step:  # damaged, or training would have gone on from it
                shutil.rmtree(path)
        found = [path for path in found if _step(path) <= step]
        rated = {path: loss for path in found if (loss := _loss(path)) is not None}
        best = min(rated, key=rated.__getitem__) if rated else None
        for path in found[: -self.keep]:
            if path != best:
                shutil.rmtree(path)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The facts that `save` was given; raises ValueError where the file is damaged."""
    path = checkpoint / _STATE
    sealed = json.loads(path.read_text("utf-8"))
    if _sha256(sealed["state"]) != sealed["sha256"]:
        raise ValueError(f"{path}: its checksum is not the recorded one")
    state: dict[str, Any] = json.loads(sealed["state"])
    return state


class Reader:
    """Whole tensors of a checkpoint, put together from all ranks' pieces."""

    def __init__(self, checkpoint: Path):
        self._places: dict[str, list[tuple[Path, int, tuple[int, ...]]]] = {}
        for rank in range(len(read_state(checkpoint)["records"])):
            record = _record(checkpoint, rank)
            pieces = json.loads(record.read_text("utf-8"))["pieces"]
            for name, (begin, shape) in pieces.items():
                place = record.with_suffix(".safetensors"), begin, tuple(shape)
                self._places.setdefault(name, []).append(place)

    def read(self, name: str) -> torch.Tensor:
        """Raises KeyError where the checkpoint has no such tensor, ValueError where a part of it is missing."""
        shape = self._places[name][0][2]
        values = []
        for path, _, _ in sorted(self._places[name], key=lambda place: place[1]):
            with safe_open(path, "pt") as file:
                values.append(file.get_tensor(name))
        if sum(map(len, values)) != prod(shape):
            raise ValueError(f"{path.parent}: {name} has {sum(map(len, values))} of {prod(shape)} components")
        return torch.cat(values).view(shape)

    def __contains__(self, name: str) -> bool:
        return name in self._places


def _write_rank(folder: Path, rank: int, pieces: dict[str, Piece]) -> None:
    """The record comes last: it says that the tensors are whole."""
    record = _record(folder, rank)
    tensors = record.with_suffix(".safetensors")
    save_file({name: piece.values for name, piece in pieces.items()}, tensors)
    _sync(tensors)
    places = {name: (piece.begin, piece.shape) for name, piece in pieces.items()}
    _write_synced(record, json.dumps({"sha256": _checksum(tensors), "pieces": places}).encode())


def _loss(checkpoint: Path) -> float | None:
    """None where it was not said, or is damaged."""
    try:
        loss = read_state(checkpoint).get("loss")
    except (OSError, ValueError, KeyError):
        return None
    return None if loss is None else float(loss)


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file."""
    try:
        for rank, checksum in enumerate(read_state(checkpoint)["records"]):
            record = _record(checkpoint, rank)
            if _checksum(record) != checksum:
                return f"{record}: damaged: its checksum is not the recorded one"
            tensors = record.with_suffix(".safetensors")
            if _checksum(tensors) != json.loads(record.read_text("utf-8"))["sha256"]:
                return f"{tensors}: damaged: its checksum is not the recorded one"
    except (OSError, ValueError, KeyError) as error:
        return f"{checkpoint}: damaged: {error}"
    return None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _record(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.json"


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _write_synced(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_bytes(content)
    _sync(temporary)
    temporary.replace(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _until(done: Callable[[], bool], folder: Path) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not done():
        if time.monotonic() > deadline:
            raise OSError(f"{folder}: not all ranks wrote their files within {_PATIENCE:.0f} s")
        time.sleep(0.05)
