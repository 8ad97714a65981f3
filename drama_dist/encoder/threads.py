"""Many small jobs on the CPU: a thread for each, where PyTorch would share out every operation among all threads.

Covers inference only: gradients of several threads would meet in the same tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")


def side_by_side(call: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[Result]:
    """Results in the jobs' order, as many jobs at a time as PyTorch has threads, without gradients.

    With fewer than two jobs for each thread they run one after another, each on all threads. Until the last result is
    taken, or the iterator closed, threads that other code starts have one thread in PyTorch, too.
    """
    threads = torch.get_num_threads()
    quiet = torch.no_grad()(call)  # gradients are switched off for a thread, not for those that it starts
    if threads == 1 or len(jobs) < 2 * threads:
        yield from map(quiet, jobs)
        return
    pool = ThreadPoolExecutor(threads, "drama-encode", torch.set_num_threads, (1,))
    try:
        yield from pool.map(quiet, jobs)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
