"""Jobs side by side: order, threads, errors."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from drama_dist.encoder.threads import side_by_side


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_jobs_run_at_once_with_a_thread_each_and_without_gradients() -> None:
    together = threading.Barrier(3, timeout=60)  # breaks unless three jobs are there at once

    def job(number: int) -> tuple[int, int, bool]:
        together.wait()
        return number, torch.get_num_threads(), torch.is_grad_enabled()

    assert list(side_by_side(job, range(6))) == [(number, 1, False) for number in range(6)]
    assert torch.get_num_threads() == 3 and torch.is_grad_enabled()


def test_few_jobs_run_one_after_another_on_all_threads() -> None:
    def job(number: int) -> tuple[int, threading.Thread, bool]:
        return torch.get_num_threads(), threading.current_thread(), torch.is_grad_enabled()

    assert list(side_by_side(job, range(5))) == [(3, threading.current_thread(), False)] * 5
    assert torch.is_grad_enabled()


def test_an_error_ends_the_jobs_that_have_not_begun() -> None:
    begun = []

    def job(number: int) -> None:
        begun.append(number)
        if number == 0:
            raise ValueError("job 0")
        torch.randn(1000, 1000) @ torch.randn(1000, 1000)

    with pytest.raises(ValueError, match="job 0"):
        list(side_by_side(job, range(1000)))
    assert len(begun) < 1000
    assert torch.get_num_threads() == 3
