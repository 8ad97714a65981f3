"""What several kernels' tests need."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

from drama_dist.distributed.precision import cpuinfo
from drama_dist.kernels import native
from drama_dist.kernels.info_nce import cpu
from drama_dist.kernels.llama_cpu import attention

# Builds for lesser CPUs, and the flag they need: AVX2's narrower vectors; AVX-512 without bfloat16; without AMX.
NARROWER = {"x86-64-v3": "avx2", "x86-64-v4": "avx512vl", "cooperlake": "avx512_bf16"}


@pytest.fixture
def nan_in_new_memory() -> Iterator[None]:
    """torch.empty gives NaN (PyTorch's fill_uninitialized_memory)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(
    params=[
        "native",
        "x86-64-v3",
        *(pytest.param(name, marks=pytest.mark.slow) for name in NARROWER if name != "x86-64-v3"),
    ]
)
def instructions(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The compiled kernels as they come, and as CPUs without AMX or AVX-512 would have them.

    The test's module says in KERNEL which of the modules with an `extension` it is about.
    """
    if request.param == "native":
        return
    if NARROWER[request.param] not in cpuinfo("flags").split():
        pytest.skip(f"this CPU cannot run a build for {request.param}: no {NARROWER[request.param]}")
    module: ModuleType = request.module.KERNEL
    source = {cpu: "tiles.cpp", attention: "attention.cpp"}[module]
    narrower = _build(Path(str(module.__file__)).with_name(source), request.param, tmp_path_factory.getbasetemp())
    monkeypatch.setattr(module, "extension", lambda: narrower)


@lru_cache
def _build(source: Path, architecture: str, folder: Path) -> ctypes.CDLL:
    target = folder / f"{source.stem}-{architecture}.so"
    flags = ["-O3", f"-march={architecture}", f"-I{native.HEADERS}", "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, str(source), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))
