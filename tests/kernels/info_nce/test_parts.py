"""Columns in parts, as ranks have them when queries travel: their results are the whole's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import BACKENDS, DIMS, WEIGHTS, Outcome, assert_gradients_close, device_of, inputs, options, ours_and_truth

from drama_dist.kernels import ColumnPart, InfoNCE, info_nce

CUTS = (0, 1, 31, 70)  # of the columns into parts


def in_parts(backend: str, merged: bool) -> tuple[list[InfoNCE], list[torch.Tensor]]:
    """Three threads with a part of the columns each: their results; and the gradients of queries and passages."""
    queries, passages, positives, ids = inputs(33, 70, torch.float32, device_of(backend))
    excluded = options("excluded", 33, 70, ids)["excluded_ids"]
    slots: list[tuple[torch.Tensor, ...]] = [()] * (len(CUTS) - 1)
    meeting, turn = threading.Barrier(len(slots)), threading.Lock()  # Triton's interpreter takes one thread at a time

    def merge_of(part: int) -> Callable[..., tuple[torch.Tensor, ...]]:
        def merge(*scores: torch.Tensor) -> tuple[torch.Tensor, ...]:
            slots[part] = scores
            turn.release()
            meeting.wait(120)
            positive, negatives, best = (torch.stack(each) for each in zip(*slots, strict=True))
            meeting.wait(120)
            turn.acquire()
            return (positive.sum(0), negatives.logsumexp(0), best.amax(0)) if merged else scores

        return merge

    def run(part: int) -> Outcome:
        begin, end = CUTS[part : part + 2]
        leaves = queries.detach().requires_grad_(), passages[begin:end].detach().requires_grad_()
        here = torch.where((positives >= begin) & (positives < end), positives - begin, -1)
        with turn:
            result = info_nce(
                *leaves,
                here,
                temperature=0.05,
                dims=DIMS,
                dim_weights=WEIGHTS,
                passage_ids=ids[begin:end],
                excluded_ids=excluded,
                part=ColumnPart(ids[positives], 39, merge_of(part)),
                backend=backend,
            )
            return result, list(torch.autograd.grad(2.5 * result.loss, leaves))

    with ThreadPoolExecutor(len(slots)) as pool:
        results, gradients = zip(*pool.map(run, range(len(slots))), strict=True)
    return list(results), [sum(each[0] for each in gradients), torch.cat([each[1] for each in gradients])]


@pytest.mark.parametrize("backend", list(BACKENDS), indirect=True)
def test_parts_of_the_columns_make_up_the_whole(backend: str) -> None:
    (ours, _), (truth, exact) = ours_and_truth(backend, (33, 70), torch.float32, "excluded")
    results, gradients = in_parts(backend, merged=True)
    for result in results:
        torch.testing.assert_close(result.loss.double(), truth.loss, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(result.margins, ours.margins, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert sum(int(result.masked) for result in results) == int(ours.masked)
    assert_gradients_close([gradient.double() for gradient in gradients], exact, torch.float32)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_parts_that_are_not_merged_are_found_out(backend: str) -> None:
    losses = [float(result.loss.detach()) for result in in_parts(backend, merged=False)[0]]
    assert max(losses) - min(losses) > 0.1
