"""Which implementation of the losses runs where: decided here for the losses, the plan and the doctor.

There are five: `reference` (reference.py, the oracle, only by name), `eager` (PyTorch operations, any device and
precision), `cpu` (C++ compiled for this CPU), and two for GPUs: `cuda` (Triton kernels between cuBLAS' products)
and, only by name, `fused` (the products inside). One of them goes when both were timed on one GPU
(benchmarks/gpu_check.py).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from drama_dist.kernels.info_nce import cpu
from drama_dist.kernels.info_nce.eager import EagerTiles
from drama_dist.kernels.info_nce.tiles import Tiles


@dataclass(frozen=True)
class Backend:
    """An implementation of the losses that goes through the queries in chunks of rows.

    rows, columns: B queries and N passages (of the largest part, where parts have some each); dims in any order;
    teacher: components of a teacher's vectors for soft targets, None for InfoNCE.
    """

    name: str
    tiles: type[Tiles]

    def chunks(self, rows: int, columns: int, dims: Sequence[int], teacher: int | None = None) -> list[slice]:
        """The chunks, in order."""
        return list(self.tiles.chunking.slices(rows, columns, len(dims) + (teacher is not None)))

    def held_bytes(self, rows: int, columns: int, dims: Sequence[int], threads: int, teacher: int | None = None) -> int:
        """What a call holds at most beside its float32 inputs, with the mask of passage ids; threads: PyTorch's.

        A teacher's sparse logits come on top, with at most 40 bytes for each entry.

        The scores of one chunk are the part that grows with rows × columns, up to a limit: 64 MiB (eager), 128 MiB
        (cpu), 1 GiB (cuda; half of that more where float32 vectors are rounded), or 1.5 GiB of gradients' operands
        (fused, half of it in bfloat16), or a backend's least chunk where many columns exceed it. A matrix of scores
        that is smaller is one chunk.
        """
        return self.tiles.held_bytes(rows, columns, tuple(sorted(dims)), threads, teacher)


@cache
def _cuda() -> type[Tiles] | None:
    """None, with a warning, without Triton."""
    try:
        from drama_dist.kernels.info_nce.cuda import CUDATiles
    except ImportError as error:
        warnings.warn(
            f"Triton cannot be imported ({error}): on CUDA the loss goes on with slower PyTorch operations; "
            "pip install triton",
            stacklevel=3,
        )
        return None
    return CUDATiles


def _fused() -> type[Tiles] | None:
    """None, without a warning, where Triton lacks what it needs: it is asked for by name."""
    try:
        from drama_dist.kernels.info_nce.fused import FusedTiles
    except ImportError:
        return None
    return FusedTiles


def _cpu() -> type[Tiles] | None:
    """None, with a warning, without a C++ compiler."""
    return None if cpu.extension() is None else cpu.CPUTiles


@dataclass(frozen=True)
class _Entry:
    """What vectors a backend takes, and its tiles; load gives None where they cannot be had on this machine."""

    devices: tuple[str, ...]  # none: every device
    dtypes: tuple[torch.dtype, ...]
    load: Callable[[], type[Tiles] | None]

    def takes(self, device: str, dtype: torch.dtype) -> bool:
        return dtype in self.dtypes and (not self.devices or device in self.devices)


_COMPILED_FOR = (torch.float32, torch.bfloat16, torch.float16)
_BACKENDS = {  # the fastest first, down to eager, which takes all vectors; what comes after it is had by name alone
    "cuda": _Entry(("cuda",), _COMPILED_FOR, _cuda),
    "cpu": _Entry(("cpu",), _COMPILED_FOR, _cpu),
    "eager": _Entry((), (torch.float64, *_COMPILED_FOR), lambda: EagerTiles),
    "fused": _Entry(("cuda",), _COMPILED_FOR, _fused),
}
NAMES = ("auto", "reference", *_BACKENDS)


def select_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """The fastest that takes vectors of a precision on a device.

    `cuda` on CUDA and `cpu` on CPUs, in float32, bfloat16 and float16; else `eager`: in float64, on other devices,
    and, with one warning, on CUDA without Triton and on CPUs without a C++ compiler.
    """
    for name, entry in _BACKENDS.items():
        if entry.takes(device.type, dtype) and (tiles := entry.load()) is not None:
            return Backend(name, tiles)
    raise ValueError(f"no backend of the loss takes {dtype} on {device.type}")


def named_backend(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend of that name, or the one selected for `auto`; ValueError where it does not take such vectors."""
    if name == "auto":
        return select_backend(device, dtype)
    entry = _BACKENDS[name]
    interpreted = (
        "cuda" in entry.devices and os.environ.get("TRITON_INTERPRET") == "1"
    )  # Triton's own, on CPUs, for tests
    tiles = entry.load() if entry.takes("cuda" if interpreted else device.type, dtype) else None
    if tiles is None:
        dtypes = ", ".join(str(each).removeprefix("torch.") for each in entry.dtypes)
        raise ValueError(
            f"backend={name!r} takes {dtypes} on {', '.join(entry.devices)}, where its kernels compile: got {dtype} "
            f"on {device.type}; backend='auto' takes what fits"
        )
    return Backend(name, tiles)
