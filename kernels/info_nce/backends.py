"""Which implementation of the loss runs where: decided here for the loss, the plan and the doctor.

Four there are: `reference` (reference.py, the oracle, only by name), `eager` (PyTorch operations, any device and
precision), `cpu` (C++ compiled for this CPU) and `cuda` (Triton kernels between cuBLAS' products).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from drama_dist.kernels.info_nce import cpu
from drama_dist.kernels.info_nce.eager import EagerTiles
from drama_dist.kernels.info_nce.tiles import Tiles

NAMES = ("auto", "reference", "eager", "cpu", "cuda")
_COMPILED_FOR = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Backend:
    """An implementation of the loss that goes through the queries in chunks of rows.

    rows, columns: B queries and N passages (of the largest part, where parts have some each); dims in any order.
    """

    name: str
    tiles: type[Tiles]

    def chunks(self, rows: int, columns: int, dims: Sequence[int]) -> list[slice]:
        """The chunks, in order."""
        return list(self.tiles.chunking.slices(rows, columns, len(dims)))

    def chunk_rows(self, rows: int, columns: int, dims: Sequence[int]) -> list[int]:
        """How many rows each chunk has."""
        return [chunk.stop - chunk.start for chunk in self.chunks(rows, columns, dims)]

    def held_bytes(self, rows: int, columns: int, dims: Sequence[int], threads: int) -> int:
        """What a call holds at most beside its float32 inputs, with the mask of passage ids; threads: PyTorch's.

        The scores of one chunk are the part that grows with rows × columns, up to a limit: 64 MiB (eager), 128 MiB
        (cpu) or 1 GiB (cuda), or a backend's least chunk where many columns exceed it. A matrix of scores that is
        smaller is one chunk.
        """
        return self.tiles.held_bytes(rows, columns, tuple(sorted(dims)), threads)


_EAGER, _CPU = Backend("eager", EagerTiles), Backend("cpu", cpu.CPUTiles)


def select_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """The fastest that takes vectors of a precision on a device.

    `cuda` on CUDA and `cpu` on CPUs, in float32, bfloat16 and float16; else `eager`: in float64, on other devices,
    and, with one warning, on CUDA without Triton and on CPUs without a C++ compiler.
    """
    if dtype in _COMPILED_FOR and device.type == "cuda":
        return _cuda() or _EAGER
    if dtype in _COMPILED_FOR and device.type == "cpu" and cpu.extension() is not None:
        return _CPU
    return _EAGER


def named_backend(name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend of that name, or the one selected for `auto`; ValueError where it does not take such vectors."""
    if name == "auto":
        return select_backend(device, dtype)
    if name == "eager":
        return _EAGER
    interpreted = name == "cuda" and os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own, on CPUs, for tests
    backend = select_backend(torch.device(name), dtype)
    if backend.name != name or (device.type != name and not interpreted):
        raise ValueError(
            f"backend={name!r} takes float32, bfloat16 and float16 on {name}, where its kernels compile: got {dtype} "
            f"on {device.type}; backend='auto' takes what fits"
        )
    return backend


@cache
def _cuda() -> Backend | None:
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
    return Backend("cuda", CUDATiles)
