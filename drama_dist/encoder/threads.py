"""CPU threads that run many small jobs concurrently, each with one PyTorch thread and without gradients.

By default PyTorch divides every operation among all threads, which costs more than it gains if the operation is small.
Covers the threads, not the jobs: backbone.py decides on those.
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
    """Yield results in the jobs' order, running as many jobs at a time as PyTorch has threads in the caller.

    A job's error is raised at its turn. After that, or if the iterator is closed early, no more jobs start. Settings of
    the caller's thread, such as autocast, do not apply to the jobs.
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


# The pool is kept because set_num_threads in one thread also applies to all threads that start later: it is reset as
# soon as every thread of the pool has called it.
@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    started = threading.Barrier(threads + 1)

    def begin() -> None:
        torch.get_num_threads()  # a thread's first call takes over the number last set in any thread
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(threads, "drama-encode", begin)
    try:
        for _ in range(threads):
            pool.submit(int)  # starts a thread if none is idle
        started.wait()
    except BaseException:
        started.abort()
        raise
    finally:
        torch.set_num_threads(threads)
    return pool


def _reset_after_fork() -> None:
    """A forked child has none of the threads, and its copy of the lock may be held."""
    global _STARTING
    _STARTING = threading.Lock()
    _pool.cache_clear()


os.register_at_fork(after_in_child=_reset_after_fork)
