"""Columns in parts, as ranks have them when queries travel: their results are the whole's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import teachers
import torch
from cases import (
    BACKENDS,
    DIMS,
    WEIGHTS,
    assert_gradients_close,
    device_of,
    inputs,
    options,
    ours_and_truth,
    uninterpreted,
)

from drama_dist.kernels import ColumnPart, InfoNCE, SoftTargets, TeacherScores, info_nce, soft_targets

CUTS = (0, 1, 31, 70)  # of the columns into parts
GIVEN: dict[str, Any] = {"temperature": 0.05, "dims": DIMS, "dim_weights": WEIGHTS}
Merge = Callable[..., tuple[torch.Tensor, ...]]


def in_parts(
    backend: str, loss_of: Callable[[torch.Tensor, torch.Tensor, slice, Merge], Any], merged: Merge | None
) -> tuple[list[Any], list[torch.Tensor]]:
    """Three threads with a part of the columns each: their results; and the gradients of queries and passages.

    merged: of the parts' statistics, each stacked; None leaves every part its own.
    """
    queries, passages, *_ = inputs(33, 70, torch.float32, device_of(backend))
    slots: list[tuple[torch.Tensor, ...]] = [()] * (len(CUTS) - 1)
    meeting, turn = threading.Barrier(len(slots)), threading.Lock()  # Triton's interpreter takes one thread at a time

    def merge_of(part: int) -> Merge:
        def merge(*scores: torch.Tensor) -> tuple[torch.Tensor, ...]:
            slots[part] = scores
            turn.release()
            meeting.wait(120)
            stacked = [torch.stack(each) for each in zip(*slots, strict=True)]
            meeting.wait(120)
            turn.acquire()
            return merged(*stacked) if merged else scores

        return merge

    def run(part: int) -> tuple[Any, list[torch.Tensor]]:
        columns = slice(*CUTS[part : part + 2])
        leaves = queries.detach().requires_grad_(), passages[columns].detach().requires_grad_()
        with turn:
            result = loss_of(*leaves, columns, merge_of(part))
            return result, list(torch.autograd.grad(2.5 * result.loss, leaves))

    with ThreadPoolExecutor(len(slots)) as pool:
        results, gradients = zip(*pool.map(run, range(len(slots))), strict=True)
    return list(results), [sum(each[0] for each in gradients), torch.cat([each[1] for each in gradients])]


def info_nce_in_parts(backend: str, merged: bool = True) -> tuple[list[InfoNCE], list[torch.Tensor]]:
    """See in_parts."""
    _, _, positives, ids = inputs(33, 70, torch.float32, device_of(backend))
    excluded = options("excluded", 33, 70, ids)["excluded_ids"]

    def loss_of(queries: torch.Tensor, passages: torch.Tensor, columns: slice, merge: Merge) -> InfoNCE:
        here = torch.where((positives >= columns.start) & (positives < columns.stop), positives - columns.start, -1)
        part = ColumnPart(ids[positives], 39, merge)
        given = {"passage_ids": ids[columns], "excluded_ids": excluded, "part": part, "backend": backend}
        return info_nce(queries, passages, here, **GIVEN, **given)

    def merge(positive: torch.Tensor, negatives: torch.Tensor, best: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return positive.sum(0), negatives.logsumexp(0), best.amax(0)

    return in_parts(backend, loss_of, merge if merged else None)


def soft_targets_in_parts(backend: str, merged: bool = True) -> tuple[list[SoftTargets], list[torch.Tensor]]:
    """See in_parts."""
    scores = teachers.teacher("both", 33, 70, device_of(backend))
    assert scores.sparse is not None

    def loss_of(queries: torch.Tensor, passages: torch.Tensor, columns: slice, merge: Merge) -> SoftTargets:
        own = TeacherScores(scores.queries_BT, scores.passages_NT[columns], scores.sparse.of_columns(columns))
        part = ColumnPart(None, 39, merge)
        return soft_targets(queries, passages, own, part=part, backend=backend, **GIVEN)

    def merge(
        student: torch.Tensor, teacher: torch.Tensor, expected: torch.Tensor, entropy: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        whole = teacher.logsumexp(0)
        shares = (teacher - whole).exp()
        entropies = (shares * (entropy + whole - teacher)).sum(0)
        return student.logsumexp(0), whole, (shares.unsqueeze(1) * expected).sum(0), entropies

    return in_parts(backend, loss_of, merge if merged else None)


@pytest.mark.parametrize("backend", list(BACKENDS), indirect=True)
def test_parts_of_the_columns_make_up_the_whole(backend: str) -> None:
    (ours, _), (truth, exact) = ours_and_truth(backend, (33, 70), torch.float32, "excluded")
    results, gradients = info_nce_in_parts(backend)
    for result in results:
        torch.testing.assert_close(result.loss.double(), truth.loss, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(result.margins, ours.margins, rtol=1e-4, atol=1e-4, equal_nan=True)
    assert sum(int(result.masked) for result in results) == int(ours.masked)
    assert_gradients_close([gradient.double() for gradient in gradients], exact, torch.float32)


@uninterpreted
def test_parts_of_a_teachers_columns_make_up_the_whole(backend: str) -> None:
    _, (truth, exact) = teachers.ours_and_truth(backend, (33, 70), torch.float32, "both")
    results, gradients = soft_targets_in_parts(backend)
    for result in results:
        teachers.assert_close(result, truth, 2e-6)
    assert_gradients_close([gradient.double() for gradient in gradients], exact, torch.float32)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("of_loss", [info_nce_in_parts, soft_targets_in_parts])
def test_parts_that_are_not_merged_are_found_out(backend: str, of_loss: Callable[..., Any]) -> None:
    losses = [float(result.loss.detach()) for result in of_loss(backend, merged=False)[0]]
    assert max(losses) - min(losses) > 0.1
