"""Jobs side by side: order, threads, errors, callers that leave early, two callers at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
import torch

from drama_dist.encoder import threads
from drama_dist.encoder.threads import side_by_side


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    threads._pool.cache_clear()
    yield
    torch.set_num_threads(before)


def in_a_new_thread(ask: Callable[[], int]) -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(ask).result()


def test_jobs_run_at_once_with_a_thread_each_and_without_gradients() -> None:
    together = threading.Barrier(3, timeout=60)  # breaks unless three jobs are there at once

    def job(index: int) -> tuple[int, int, bool]:
        together.wait()
        return index, torch.get_num_threads(), torch.is_grad_enabled()

    results = side_by_side(job, range(6))
    first = next(results)
    assert torch.get_num_threads() == 3 == in_a_new_thread(torch.get_num_threads)  # meanwhile, too
    assert [first, *results] == [(index, 1, False) for index in range(6)]
    assert torch.get_num_threads() == 3 == in_a_new_thread(torch.get_num_threads)
    assert torch.is_grad_enabled()


def test_two_callers_at_once_get_their_own_results_from_the_same_threads() -> None:
    workers = set()

    def job(index: int) -> int:
        workers.add(threading.get_ident())
        torch.randn(100, 100) @ torch.randn(100, 100)
        return index

    with ThreadPoolExecutor(2) as callers:
        results = list(callers.map(lambda first: list(side_by_side(job, range(first, first + 50))), (0, 100)))
    assert results == [list(range(50)), list(range(100, 150))]
    assert len(workers) <= 3


def test_the_number_of_threads_follows_pytorchs() -> None:
    for threads_now in (3, 2):
        torch.set_num_threads(threads_now)
        workers = set(side_by_side(lambda _: (time.sleep(0.01), threading.get_ident())[1], range(20)))
        assert 1 <= len(workers) <= threads_now
        assert torch.get_num_threads() == threads_now == in_a_new_thread(torch.get_num_threads)


def test_an_error_ends_the_jobs_that_have_not_begun() -> None:
    begun = []

    def job(index: int) -> None:
        begun.append(index)
        if index == 0:
            raise ValueError("job 0")
        torch.randn(1000, 1000) @ torch.randn(1000, 1000)

    with pytest.raises(ValueError, match="job 0"):
        list(side_by_side(job, range(1000)))
    assert list(side_by_side(abs, range(9))) == list(range(9))  # behind all that was not taken back
    assert len(begun) < 1000


def test_a_caller_that_leaves_ends_the_jobs_that_have_not_begun() -> None:
    begun = []

    def job(index: int) -> None:
        begun.append(index)
        torch.randn(1000, 1000) @ torch.randn(1000, 1000)

    with pytest.raises(KeyboardInterrupt), closing(side_by_side(job, range(1000))) as results:
        for _ in results:
            raise KeyboardInterrupt
    assert list(side_by_side(abs, range(9))) == list(range(9))
    assert len(begun) < 1000


def test_threads_that_cannot_be_started_do_not_hold_up_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = threading.Thread.start, []

    def start_two(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_two)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        list(side_by_side(abs, range(9)))
    for thread in started:
        thread.join(timeout=60)
        assert not thread.is_alive()
    monkeypatch.undo()
    assert torch.get_num_threads() == 3 == in_a_new_thread(torch.get_num_threads)
    assert list(side_by_side(abs, range(9))) == list(range(9))
