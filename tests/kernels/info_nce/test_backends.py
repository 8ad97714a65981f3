"""Which backend runs where, what it says it holds, and the processes and threads around it."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import DIMS, ON_GPU, device_of, inputs
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from drama_dist.kernels import info_nce, native, select_backend
from drama_dist.kernels.info_nce import backends
from drama_dist.kernels.info_nce.eager import EagerTiles

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_triton = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")


@pytest.fixture
def anew() -> Iterator[None]:
    """What was found out about compilers is forgotten, before and after."""
    native.library.cache_clear()
    backends._cuda.cache_clear()
    yield
    native.library.cache_clear()
    backends._cuda.cache_clear()


def test_float64_and_other_devices_take_eager_operations() -> None:
    assert select_backend(CPU, torch.float32).name == select_backend(CPU, torch.bfloat16).name == "cpu"
    assert select_backend(CPU, torch.float64).name == select_backend(CUDA, torch.float64).name == "eager"
    assert select_backend(torch.device("mps"), torch.float32).name == "eager"


@needs_triton
def test_cuda_takes_triton() -> None:
    assert select_backend(CUDA, torch.bfloat16).name == select_backend(CUDA, torch.float32).name == "cuda"


@pytest.mark.usefixtures("anew")
def test_without_a_compiler_it_says_so_once_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(source: Path, openmp: bool) -> Path:
        raise RuntimeError("no g++")

    monkeypatch.setattr(native, "_build", no_compiler)
    queries, passages, positives, _ = inputs(3, 4, torch.float32)
    with pytest.warns(UserWarning, match=r"tiles.cpp was not compiled \(no g\+\+\).*install a C\+\+ compiler"):
        info_nce(queries, passages, positives, temperature=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        info_nce(queries, passages, positives, temperature=0.1)
        assert select_backend(CPU, torch.float32).name == "eager"
        with pytest.raises(ValueError, match=r"backend='cpu' takes .* where its kernels compile"):
            info_nce(queries, passages, positives, temperature=0.1, backend="cpu")


@pytest.mark.usefixtures("anew")
def test_without_triton_cuda_takes_eager_operations_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "drama_dist.kernels.info_nce.cuda", None)  # as if its imports failed
    with pytest.warns(UserWarning, match=r"Triton cannot be imported .* on CUDA the loss goes on with slower PyTorch"):
        assert select_backend(CUDA, torch.float32).name == "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select_backend(CUDA, torch.float32).name == "eager"


def test_a_backend_refuses_vectors_that_it_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    queries, passages, positives, _ = inputs(2, 5, torch.float32)
    with pytest.raises(ValueError, match=r"backend='cuda' takes .* on cuda, .*: got torch\.float32 on cpu"):
        info_nce(queries, passages, positives, temperature=0.1, backend="cuda")
    for name in ("cpu", *ON_GPU):
        with pytest.raises(ValueError, match=f"backend='{name}' takes float32, .*: got torch.float64 on cpu"):
            info_nce(queries.double(), passages.double(), positives, temperature=0.1, backend=name)


def test_a_second_backend_of_a_device_is_one_entry_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    second = backends._Entry(("cpu",), (torch.float64,), lambda: EagerTiles)
    monkeypatch.setattr(backends, "_BACKENDS", {"second": second, **backends._BACKENDS})
    assert select_backend(CPU, torch.float64).name == backends.named_backend("second", CPU, torch.float64).name
    assert select_backend(CPU, torch.float32).name == "cpu"
    with pytest.raises(ValueError, match=r"backend='second' takes float64 on cpu, .*: got torch\.float32 on cpu"):
        backends.named_backend("second", CPU, torch.float32)


class Held(TorchDispatchMode):
    """Bytes of all storages that operations made and that are still there, at their most.

    inputs: were there before; Triton's interpreter makes new tensors of their storages.
    """

    def __init__(self, *inputs: torch.Tensor) -> None:
        super().__init__()
        self._inputs = {StorageWeakRef(tensor.untyped_storage()) for tensor in inputs}
        self.peak = 0
        self._made: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {StorageWeakRef(tensor.untyped_storage()) for tensor in args if isinstance(tensor, torch.Tensor)}
        given |= self._inputs
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            reference = StorageWeakRef(storage)
            if reference not in given:
                self._made.setdefault(reference, storage.nbytes())
        self._made = {reference: size for reference, size in self._made.items() if not reference.expired()}
        self.peak = max(self.peak, sum(self._made.values()))
        return result


@pytest.mark.parametrize(
    ("name", "rows", "columns", "rounded"),
    [(name, *size, False) for name in ("eager", "cpu") for size in ((1300, 2500), (300, 9000))]
    + [(name, 130, 400, False) for name in ON_GPU]
    + [pytest.param(name, 130, 400, True, marks=pytest.mark.gpu) for name in ON_GPU]  # elsewhere products take copies
    + [pytest.param(name, 40, 900, False, marks=pytest.mark.slow) for name in ON_GPU],  # Triton's interpreter is slow
)
def test_no_more_is_held_than_it_says(name: str, rows: int, columns: int, rounded: bool) -> None:
    backend = backends.named_backend(name, torch.device(device_of(name)), torch.float32)
    queries, passages = (torch.randn(count, 96, device=device_of(name)).requires_grad_() for count in (rows, columns))
    ids, positives = (torch.arange(count, device=queries.device) for count in (columns, rows))
    with Held(queries, passages, ids, positives) as held:
        given = {"dims": (96, 32), "passage_ids": ids, "rounded": rounded, "backend": backend.name}
        info_nce(queries, passages, positives, temperature=0.1, **given)
    said = backend.held_bytes(rows, columns, (96, 32), torch.get_num_threads())
    assert said / 2 < held.peak <= said
    assert backend.chunks(rows, columns, (96, 32))[0].stop * columns * 4 * 2 < said


@pytest.mark.parametrize("teacher", [None, 19])
def test_memory_grows_with_columns_and_not_with_rows(teacher: int | None) -> None:
    for backend in (select_backend(CPU, torch.float64), select_backend(CPU, torch.float32)):
        base, wide, tall = (
            backend.held_bytes(*shape, DIMS, 1, teacher) for shape in ((4096, 4096), (4096, 16384), (16384, 4096))
        )
        assert wide > 1.5 * base > tall


def _loss(queries: torch.Tensor, passages: torch.Tensor) -> float:
    """With a product in PyTorch's own threads before it."""
    leaves = [(side + 0 * (side @ side.T).sum()).requires_grad_() for side in (queries, passages)]
    loss = info_nce(*leaves, torch.arange(len(queries)), temperature=0.1, backend="cpu").loss
    loss.backward()
    return float(loss.detach())


def _fork(queries: torch.Tensor, passages: torch.Tensor, after_a_loss: bool) -> None:
    """Two of PyTorch's threads work here, and the loss where it is to; then a forked child has its loss."""
    torch.set_num_threads(2)
    (queries @ passages.T).exp()
    if after_a_loss:
        _loss(queries, passages)
    forking = multiprocessing.get_context("fork")
    receiver, sender = forking.Pipe(duplex=False)
    child = forking.Process(target=lambda: sender.send(_loss(queries, passages)))
    child.start()
    try:
        assert receiver.poll(60), "the child hangs"
        assert receiver.recv() == pytest.approx(_loss(queries, passages), rel=1e-6)
    finally:
        child.kill()
        child.join()


@pytest.mark.parametrize("after_a_loss", [False, True])
def test_a_forked_child_does_not_wait_for_its_parents_threads(after_a_loss: bool) -> None:
    """The parent is a process of its own, this file as a program: in this one other tests have run the loss."""
    command = [sys.executable, __file__, *(["after a loss"] if after_a_loss else [])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]


if __name__ == "__main__":
    _generator = torch.Generator().manual_seed(0)
    _fork(*(torch.randn(count, 96, generator=_generator) for count in (800, 1500)), after_a_loss=len(sys.argv) > 1)
