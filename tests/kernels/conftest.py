"""What several kernels' tests need."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from drama_dist.distributed.precision import cpuinfo
from drama_dist.kernels import attention, compiled_tiles, libraries

# Builds for lesser CPUs, and the flag they need.
NARROWER = {"x86-64-v3": "avx2", "x86-64-v4": "avx512vl", "cooperlake": "avx512_bf16"}


@pytest.fixture
def nan_in_new_memory() -> Iterator[None]:
    """torch.empty gives NaN (PyTorch's fill_uninitialized_memory)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["native", *NARROWER])
def instructions(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The compiled kernels as they come, and as CPUs without AMX or AVX-512 would have them."""
    if request.param != "native":
        if NARROWER[request.param] not in cpuinfo("flags").split():
            pytest.skip(f"this CPU cannot run a build for {request.param}: no {NARROWER[request.param]}")
        for module, name in ((compiled_tiles, "tiles"), (attention, "attention")):
            narrower = _build(name, request.param, tmp_path_factory.getbasetemp())
            monkeypatch.setattr(module, "extension", lambda narrower=narrower: narrower)


@lru_cache
def _build(name: str, architecture: str, folder: Path) -> ctypes.CDLL:
    source, target = Path(libraries.__file__).parent / f"{name}.cpp", folder / f"{name}-{architecture}.so"
    subprocess.run(
        ["g++", "-O3", f"-march={architecture}", "-shared", "-fPIC", str(source), "-o", str(target)], check=True
    )
    return ctypes.CDLL(str(target))
