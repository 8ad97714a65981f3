"""C++ libraries for this CPU, built the first time they are needed.

Covers building, loading and caching one source file, and calling what is in it. Says once, and gives None, where there
is no compiler. Functions are called through ctypes, which lets other threads go on meanwhile.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path

import torch

HEADERS = Path(__file__).parent  # products.h and vectors.h
_COMPILE = ("-O3", "-march=native", "-std=c++17", "-fPIC")
_PATIENCE = 600.0  # seconds that another process may take to build a library

# A forked child has none of PyTorch's OpenMP threads, which the libraries share, and would wait for them for ever.
os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))


@lru_cache
def library(source: Path, fallback: str, openmp: bool = False) -> ctypes.CDLL | None:
    """A C++ file as a library; None, with a warning that names the `fallback`, where it cannot be built.

    openmp: its loops share PyTorch's threads.
    """
    try:
        return ctypes.CDLL(str(_build(source, openmp)))
    except (OSError, RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warnings.warn(
            f"{source.name} was not compiled ({reason}): {fallback}; install a C++ compiler (g++)",
            stacklevel=2,
        )
        return None


def suffix(dtype: torch.dtype) -> str:
    """What the libraries add to the name of a function for elements of a dtype."""
    return f"_{str(dtype).removeprefix('torch.')}"


def call(compiled: ctypes.CDLL | None, name: str, dtype: torch.dtype, *arguments: torch.Tensor | float) -> None:
    """Call drama_NAME for elements of `dtype`: tensors as pointers, integers as int64, other numbers as float."""
    getattr(compiled, f"drama_{name}{suffix(dtype)}")(*map(_as_c, arguments))


def check_elements(dtype: torch.dtype, **tensors: torch.Tensor) -> None:
    """Raise ValueError where a tensor is not on the CPU, of another dtype, or the dtype is not bfloat16 or float32."""
    for name, tensor in tensors.items():
        if tensor.device.type != "cpu" or tensor.dtype != dtype or dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(
                f"{name} is {tensor.dtype} on {tensor.device}: expected bfloat16 or float32 on the CPU, as all operands"
            )


def _as_c(value: torch.Tensor | float) -> ctypes.c_void_p | ctypes.c_float | ctypes.c_int64:
    if isinstance(value, torch.Tensor):
        assert value.is_contiguous()
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int64(value)


def _build(source: Path, openmp: bool) -> Path:
    from torch.utils import cpp_extension

    # A cache folder may be shared by machines with other CPUs, and by other versions of the source and the flags.
    cpu = Path("/proc/cpuinfo").read_text("utf-8") if Path("/proc/cpuinfo").exists() else platform.processor()
    flags = next((line for line in cpu.splitlines() if line.startswith(("flags", "Features"))), cpu)
    texts = b"".join(path.read_bytes() for path in [source, *sorted(HEADERS.glob("*.h"))])
    command = [cpp_extension.get_cxx_compiler(), *_COMPILE, *(["-fopenmp"] if openmp else [])]
    key = "\0".join([flags, *command]).encode() + texts
    name = f"drama_{source.stem}_{hashlib.sha256(key).hexdigest()[:12]}"
    built = Path(cpp_extension._get_build_directory(name, verbose=False)) / f"{name}.so"
    if not _is_whole(built):
        with _alone_in(built.parent):
            if not _is_whole(built):
                _compile(command, source, built)
    return built


def _compile(command: list[str], source: Path, built: Path) -> None:
    """Write the library and, first, its digest; RuntimeError with the compiler's first complaint."""
    # OpenMP's symbols are left to PyTorch, which has loaded its own: linked to a second, they would fight for cores.
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        compiled, linked = Path(folder) / "compiled.o", Path(folder) / "linked.so"
        _run(*command, f"-I{HEADERS}", "-c", str(source), "-o", str(compiled))
        _run(command[0], "-shared", str(compiled), "-o", str(linked))
        _digest_file(built).write_text(_digest(linked), "utf-8")
        linked.replace(built)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = done.stderr.splitlines() or [f"{command[0]} ended with code {done.returncode}"]
        raise RuntimeError(next((line for line in lines if "error" in line), lines[0]))


def _is_whole(built: Path) -> bool:
    """Whether a library is as it was built: loading one that a full disk or a crash has cut short can end a process."""
    try:
        return _digest_file(built).read_text("utf-8") == _digest(built)
    except OSError:
        return False


def _digest_file(built: Path) -> Path:
    return built.with_suffix(".sha256")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """One builder at a time, where the file system has locks; TimeoutError where another builder does not end."""
    deadline = time.monotonic() + _PATIENCE
    with open(folder / "builder", "w", encoding="utf-8") as builder:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(builder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
            except OSError:
                break
        else:
            raise TimeoutError(f"another process has been building in {folder} for {_PATIENCE:.0f} s")
        yield
