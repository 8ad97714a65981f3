"""Checkpoints of a training run: written in the background, atomic, and verified before they are used.

Each rank writes the pieces of tensors that it holds. A checkpoint is a folder `step-N` with state.json and, for each
rank, a safetensors file and a record (its checksum, and each piece's offset). It can be read with another number of
ranks or another ZeRO stage. Covers writing, verifying, selecting and deleting checkpoints, but not which tensors are
in them: engine.py decides that.
"""

from __future__ import annotations

import hashlib
import json
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
from drama_dist.run.files import hash_file, sync, write_text
from drama_dist.run.progress import say

_TIMEOUT = 600.0  # seconds that rank 0 waits for the other ranks' files
_STATE = "state.json"


class CheckpointError(OSError):
    """A checkpoint could not be written, so training must not continue as if it had been."""


@dataclass(frozen=True)
class Piece:
    """Consecutive components of a tensor of shape `shape`, from component `begin` of the flattened tensor."""

    values: torch.Tensor
    begin: int
    shape: tuple[int, ...]


class Checkpoints:
    """The checkpoints of one stage; every rank makes every call. keep: how many of the newest stay besides the best."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self._writer: threading.Thread | None = None
        self._error: Exception | None = None
        self._copies: dict[str, torch.Tensor] = {}  # reused: allocating memory takes longer than copying

    def save(self, step: int, pieces: Mapping[str, Piece], **facts: Any) -> None:
        """Copy this rank's pieces and return; they are written in the background.

        facts: stored in state.json; "loss" decides which checkpoint is the best. Raises CheckpointError if the previous
        checkpoint could not be written.
        """
        self.wait()
        copied = {
            name: Piece(self._copy(name, piece.values), piece.begin, piece.shape) for name, piece in pieces.items()
        }
        arguments = step, copied, {"step": step, **facts}, ranks.rank(), ranks.world_size()
        # A daemon: it must not keep a process alive whose other ranks are gone.
        self._writer = threading.Thread(target=self._try_to_write, args=arguments, daemon=True)
        self._writer.start()

    def wait(self) -> None:
        """Wait for the checkpoint being written; raises CheckpointError on all ranks if any of them failed."""
        if self._writer is None:
            return
        self._writer.join()
        self._writer = None
        failed = [rank for rank, flag in enumerate(ranks.on_every_rank(int(self._error is not None))) if flag]
        if failed:
            reason = self._error or f"rank {failed[0]} failed; see its message"
            raise CheckpointError(f"{self.folder}: the checkpoint could not be written: {reason}") from self._error

    def clear_unfinished(self) -> None:
        """Delete checkpoints that a killed attempt left incomplete."""
        if ranks.rank() == 0:
            for path in self.folder.glob("step-*.tmp"):
                shutil.rmtree(path)
        ranks.barrier()

    def newest(self) -> Path | None:
        """The newest intact checkpoint; damaged ones are reported and skipped."""
        step = -1
        if ranks.rank() == 0:
            for path in reversed(self.whole()):
                damage = _damage(path)
                if damage is None:
                    step = _step(path)
                    break
                say(f"{damage}; falling back to the checkpoint before it")
        step = ranks.on_every_rank(step)[0]
        return None if step < 0 else self._path(step)

    def whole(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if path.suffix != ".tmp")

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:07d}"

    def _copy(self, name: str, values: torch.Tensor) -> torch.Tensor:
        copy = self._copies.get(name)
        if copy is None or copy.shape != values.shape:
            copy = self._copies[name] = torch.empty(values.shape, dtype=values.dtype)
        return copy.copy_(values.detach())

    def _try_to_write(self, *arguments: Any) -> None:
        try:
            self._write(*arguments)
        except Exception as error:  # raised by `wait`, in the training's thread
            self._error = error

    def _write(self, step: int, pieces: dict[str, Piece], facts: dict[str, Any], rank: int, size: int) -> None:
        final = self._path(step)
        folder = final.with_name(f"{final.name}.tmp")
        folder.mkdir(parents=True, exist_ok=True)
        _write_rank(folder, rank, pieces)
        if rank == 0:
            _wait_until(lambda: all(_record(folder, each).exists() for each in range(size)), folder)
            records = [hash_file(_record(folder, each)) for each in range(size)]
            state = json.dumps({**facts, "world_size": size, "records": records})
            write_text(folder / _STATE, json.dumps({"state": state, "sha256": _sha256(state)}))
            shutil.rmtree(final, ignore_errors=True)  # damaged: otherwise training would have resumed from it
            folder.rename(final)
            sync(self.folder)
            self._drop_old(step)

    def _drop_old(self, step: int) -> None:
        paths = self.whole()
        for path in paths:
            if _step(path) > step:  # damaged: otherwise training would have resumed from it
                shutil.rmtree(path)
        paths = [path for path in paths if _step(path) <= step]
        losses = {path: loss for path in paths if (loss := _loss(path)) is not None}
        best = min(losses, key=losses.__getitem__) if losses else None
        for path in paths[: -self.keep]:
            if path != best:
                shutil.rmtree(path)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The facts that `save` was given; raises ValueError if the file is damaged."""
    path = checkpoint / _STATE
    sealed = json.loads(path.read_text("utf-8"))
    if _sha256(sealed["state"]) != sealed["sha256"]:
        raise ValueError(f"{path}: its checksum does not match the recorded one")
    state: dict[str, Any] = json.loads(sealed["state"])
    return state


class Reader:
    """Full tensors of a checkpoint, assembled from all ranks' pieces."""

    def __init__(self, checkpoint: Path):
        self._pieces: dict[str, list[tuple[int, Path, tuple[int, ...]]]] = {}
        for rank in range(len(read_state(checkpoint)["records"])):
            record = _record(checkpoint, rank)
            for name, (begin, shape) in json.loads(record.read_text("utf-8"))["pieces"].items():
                piece = begin, record.with_suffix(".safetensors"), tuple(shape)
                self._pieces.setdefault(name, []).append(piece)

    def read(self, name: str) -> torch.Tensor:
        """Raises KeyError if the checkpoint has no such tensor, ValueError if a part of it is missing."""
        shape = self._pieces[name][0][2]
        values = []
        for _, path, _ in sorted(self._pieces[name], key=lambda piece: piece[0]):
            with safe_open(path, "pt") as file:
                values.append(file.get_tensor(name))
        if sum(map(len, values)) != prod(shape):
            raise ValueError(f"{path.parent}: {name} has {sum(map(len, values))} of {prod(shape)} components")
        return torch.cat(values).view(shape)

    def __contains__(self, name: str) -> bool:
        return name in self._pieces


def _write_rank(folder: Path, rank: int, pieces: dict[str, Piece]) -> None:
    """Write a rank's tensors, then its record, which means that the tensors are complete."""
    record = _record(folder, rank)
    tensors = record.with_suffix(".safetensors")
    save_file({name: piece.values for name, piece in pieces.items()}, tensors)
    sync(tensors)
    offsets = {name: (piece.begin, piece.shape) for name, piece in pieces.items()}
    write_text(record, json.dumps({"sha256": hash_file(tensors), "pieces": offsets}))


def _loss(checkpoint: Path) -> float | None:
    """None if the checkpoint records no loss, or is damaged."""
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
            if hash_file(record) != checksum:
                return f"{record}: damaged: its checksum does not match the recorded one"
            tensors = record.with_suffix(".safetensors")
            if hash_file(tensors) != json.loads(record.read_text("utf-8"))["sha256"]:
                return f"{tensors}: damaged: its checksum does not match the recorded one"
    except (OSError, ValueError, KeyError) as error:
        return f"{checkpoint}: damaged: {error}"
    return None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _record(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank:05d}.json"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _wait_until(done: Callable[[], bool], folder: Path) -> None:
    deadline = time.monotonic() + _TIMEOUT
    while not done():
        if time.monotonic() > deadline:
            raise OSError(f"{folder}: not all ranks wrote their files within {_TIMEOUT:.0f} s")
        time.sleep(0.05)
