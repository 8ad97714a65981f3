"""CPU threads that work side by side, each with one thread of PyTorch's, for many small jobs without gradients.

Covers the threads. Which jobs they are for says backbone.py: PyTorch shares out every operation among all threads, and
a small one gains less by that than it costs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")

_STARTING = threading.Lock()


def side_by_side(call: Callable[[Job], Result], jobs: Sequence[Job]) -> Generator[Result]:
    """Results in the jobs' order, of as many jobs at a time as the caller has threads in PyTorch.

    A job's error is raised in its turn. Then, and where the iterator is closed early, no more jobs begin. What is
    switched on for the caller's thread, such as autocast, is not for the jobs.
    """
    if not jobs:
        return
    with _STARTING:
        pool = _pool(torch.get_num_threads())
    quiet, futures = torch.no_grad()(call), list[Future[Result]]()
    try:
        for job in jobs:
            futures.append(pool.submit(quiet, job))
        for future in futures:
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


# The threads are kept: what one of them tells PyTorch of its own number holds for all threads that start later, so it
# is put right as soon as all have told it.
@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    started = threading.Barrier(threads + 1)

    def begin() -> None:
        torch.get_num_threads()  # at its first question a thread gets the number that was set last, in any thread
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(threads, "drama-encode", begin)
    try:
        for _ in range(threads):
            pool.submit(int)  # a thread starts where none is idle
        started.wait()
    except BaseException:
        started.abort()
        raise
    finally:
        torch.set_num_threads(threads)
    return pool


def _begin_anew() -> None:
    """In a forked child: it has none of the threads, and a lock that one of them may have held."""
    global _STARTING
    _STARTING = threading.Lock()
    _pool.cache_clear()


os.register_at_fork(after_in_child=_begin_anew)
