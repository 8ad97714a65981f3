"""Triton's kernels read and write inside their arguments only: on a GPU one access beyond ends every later launch.

Triton's interpreter lets every access be checked, which a GPU does for whole pages alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import teachers
import torch
from cases import GPU, ON_GPU, OPTIONS, ours_and_truth

interpreter = pytest.importorskip("triton.runtime.interpreter")
cuda = pytest.importorskip("drama_dist.kernels.info_nce.cuda")
pytestmark = pytest.mark.skipif(GPU, reason="Triton's interpreter is for machines without a GPU")


class Watch:
    """beyond: the accesses outside of all arguments; seen: how many elements were accessed."""

    def __init__(self) -> None:
        self._ranges = np.zeros((0, 2), dtype=np.uint64)
        self.beyond: list[str] = []
        self.seen = 0

    def arguments(self, *given: Any) -> None:
        """What may be accessed: the views that a launch is given, not the memory around them."""
        tensors = [each for each in given if isinstance(each, torch.Tensor) and each.numel()]
        ranges = [(each.data_ptr(), each.data_ptr() + _extent(each)) for each in tensors]
        self._ranges = np.array(ranges, dtype=np.uint64).reshape(-1, 2)

    def access(self, pointers: Any, mask: Any, what: str) -> None:
        asked = np.broadcast_to(mask, pointers.shape)
        at = pointers[asked].astype(np.uint64)[:, None]
        self.seen += len(at)
        inside = ((at >= self._ranges[:, 0]) & (at < self._ranges[:, 1])).any(1)
        if not inside.all():
            self.beyond.append(f"{what}: {int((~inside).sum())} of {len(at)} elements")


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from a view's first element to the end of its storage: launches are given where a chunk begins."""
    return tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size()


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watching = Watch()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor._init_args_hst

    def watched_load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        watching.access(pointers.data, mask.data, "read")
        return load(self, pointers, mask, *rest, **named)

    def watched_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        watching.access(pointers.data, mask.data, "write")
        return store(self, pointers, value, mask, *rest, **named)

    def watched_call(self: Any, positional: Any, named: Any) -> Any:
        hosts = call(self, positional, named)
        every = [*hosts[0], *hosts[1].values()]
        watching.arguments(*every, *(each.base for each in every if hasattr(each, "base")))
        return hosts

    monkeypatch.setattr(builder, "create_masked_load", watched_load)
    monkeypatch.setattr(builder, "create_masked_store", watched_store)
    monkeypatch.setattr(executor, "_init_args_hst", watched_call)
    return watching


CASES = [((7, 9), "excluded"), ((1, 5), "plain"), *(((33, 70), name) for name in OPTIONS)]


@pytest.mark.parametrize("backend", ON_GPU, indirect=True)
@pytest.mark.parametrize(
    ("shape", "option"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (number > 0)) for number, case in enumerate(CASES)],
)
def test_of_info_nce(backend: str, shape: tuple[int, int], option: str, watch: Watch) -> None:
    ours_and_truth(backend, shape, torch.float16, option)
    assert watch.seen > 0 and not watch.beyond, watch.beyond


@pytest.mark.parametrize("backend", ON_GPU, indirect=True)
@pytest.mark.parametrize("shape", [(7, 9), pytest.param((33, 70), marks=pytest.mark.slow)])
def test_of_soft_targets(backend: str, shape: tuple[int, int], watch: Watch) -> None:
    teachers.ours_and_truth(backend, shape, torch.float32, "both")
    assert watch.seen > 0 and not watch.beyond, watch.beyond


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1), (33, 70), (5, 513)], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_of_the_chunks_in_the_tiles_of_a_gpu(
    shape: tuple[int, int], option: str, watch: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = {"BY_ROWS": (1, 512, 4), "BY_COLUMNS": (2, 512, 2)}
    for name, (rows, columns, warps) in tiles.items():
        for kind in (name, f"{name}_SMALL"):
            monkeypatch.setattr(cuda, kind, {"BLOCK_R": rows, "BLOCK_C": columns, "num_warps": warps})
    ours_and_truth("cuda", shape, torch.float32, option)
    assert watch.seen > 0 and not watch.beyond, watch.beyond


def test_an_access_beyond_is_seen() -> None:
    watching, numbers = Watch(), torch.zeros(4)
    watching.arguments(numbers)
    pointers = numbers.data_ptr() + 4 * np.arange(6, dtype=np.uint64)
    watching.access(pointers, np.array([True] * 4 + [False] * 2), "read")
    assert not watching.beyond
    watching.access(pointers, np.ones(6, dtype=bool), "write")
    assert watching.beyond == ["write: 2 of 6 elements"]
