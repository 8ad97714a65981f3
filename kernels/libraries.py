"""C++ libraries for this CPU, built with ninja the first time they are needed.

Covers building, loading and caching one source file of this folder. Says once, and gives None, where there is
no compiler. The libraries' functions are called through ctypes, which lets other threads go on meanwhile.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TextIO

import torch

_FOLDER = Path(__file__).parent
_PATIENCE = 600.0  # seconds that another process may take to build a library


@lru_cache
def library(name: str, without: str, openmp: bool = False) -> ctypes.CDLL | None:
    """NAME.cpp of this folder as a library; None, with a warning that says what goes on `without` it.

    openmp: its loops share PyTorch's threads.
    """
    try:
        return ctypes.CDLL(_build(name, openmp))
    except (OSError, RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warnings.warn(
            f"{name}.cpp was not compiled ({reason}): {without}; install a C++ compiler (g++) and ninja",
            stacklevel=2,
        )
        return None


def suffix(dtype: torch.dtype) -> str:
    """What the libraries add to the name of a function for elements of a dtype."""
    return f"_{str(dtype).removeprefix('torch.')}"


def call(compiled: ctypes.CDLL | None, name: str, dtype: torch.dtype, *arguments: torch.Tensor | float) -> None:
    """Call drama_NAME for elements of `dtype`: tensors as pointers, integers as int64, other numbers as float."""
    getattr(compiled, f"drama_{name}{suffix(dtype)}")(*map(_as_c, arguments))


def elements(dtype: torch.dtype, **tensors: torch.Tensor) -> None:
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


def _build(name: str, openmp: bool) -> str:
    from torch.utils import cpp_extension

    # A cache folder may be shared by machines with other CPUs, and by other versions of the source.
    cpu = Path("/proc/cpuinfo").read_text("utf-8") if Path("/proc/cpuinfo").exists() else platform.processor()
    flags = next((line for line in cpu.splitlines() if line.startswith(("flags", "Features"))), cpu)
    source = _FOLDER / f"{name}.cpp"
    sources = b"".join(path.read_bytes() for path in [source, *sorted(_FOLDER.glob("*.h"))])
    built = f"drama_{name}_{hashlib.sha256(flags.encode() + sources).hexdigest()[:12]}"
    folder = Path(cpp_extension._get_build_directory(built, verbose=False))
    whole = folder / f"{built}.so"
    if whole.exists():
        return str(whole)
    with _ninja_on_path(), _alone_in(folder):
        if not whole.exists():
            cpp_extension.load(
                f"{built}_new",
                [str(source)],
                build_directory=str(folder),
                # OpenMP's symbols are left to PyTorch, which has loaded its own: a second would fight it for cores.
                extra_cflags=["-O3", "-march=native", *(["-fopenmp"] if openmp else [])],
                is_python_module=False,
                verbose=False,
            )
            (folder / f"{built}_new.so").replace(whole)
    return str(whole)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """One builder at a time. This lock ends with its process; PyTorch's own, a file, outlives it and halts others."""
    with open(folder / "builder", "w", encoding="utf-8") as builder:
        if _wait_for(builder):
            (folder / "lock").unlink(missing_ok=True)
        yield


def _wait_for(builder: TextIO) -> bool:
    """False on a file system without locks; raises TimeoutError where another builder does not end."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        try:
            fcntl.flock(builder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.1)
        except OSError:
            return False
    raise TimeoutError(f"another process has been building in {Path(builder.name).parent} for {_PATIENCE:.0f} s")


class _ninja_on_path:
    """The ninja of this environment, which need not be activated."""

    def __enter__(self) -> None:
        import ninja

        self._before = os.environ.get("PATH", "")
        os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, self._before])

    def __exit__(self, *_: object) -> None:
        os.environ["PATH"] = self._before
