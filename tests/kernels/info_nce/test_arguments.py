"""What the loss refuses, and says so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from cases import DIMS, K, device_of, every_backend, inputs

from drama_dist.kernels import ColumnPart, info_nce

IDS = torch.arange(5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0: expected a number from 1e-06 on"),
        ({"temperature": 1e-7}, "temperature=1e-07"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": torch.tensor([0.1])}, "temperature is a Tensor: expected a number, it gets no gradient"),
        ({"temperature": torch.tensor(0.1, requires_grad=True)}, "temperature is a Tensor"),
        ({"dims": [K + 1]}, rf"dims=\[{K + 1}\]: expected different numbers from 1 to {K}"),
        ({"dims": [3, 3]}, "different"),
        ({"dim_weights": [1.0, 2.0]}, "dim_weights"),
        ({"positives": torch.tensor([0, 9])}, "positives name columns 0..9 of 5"),
        ({"positives": torch.tensor([-1, 2])}, "positives name columns -1..2 of 5"),
        ({"positives": torch.tensor([0])}, "expected 2 int64 positives"),
        ({"passage_ids": torch.tensor([0])}, "expected 5 int64 passage_ids"),
        ({"passage_ids": torch.arange(5.0)}, "expected 5 int64 passage_ids, got .* torch.float32"),
        ({"excluded_ids": torch.tensor([[0], [1]])}, "excluded_ids: expected passage_ids beside them"),
        ({"excluded_ids": torch.tensor([0, 1]), "passage_ids": IDS}, "expected int64 excluded_ids of 2 rows"),
        ({"excluded_ids": torch.tensor([[0], [-1]]), "passage_ids": IDS - 1}, "passage id -1: expected ids from 0 on"),
        ({"backend": "triton"}, "backend='triton': expected one of auto, reference, cuda, cpu, eager, fused"),
        ({"passages": torch.ones(5, K, dtype=torch.float64)}, "of one floating dtype on one device, got torch.float32"),
        ({"passages": torch.ones(5, K - 1)}, r"expected queries B × K and passages N × K, got \(2, 37\), \(5, 36\)"),
        ({"passages": torch.ones(0, K)}, "expected queries and passages, got 2 and 0"),
        (
            {"part": ColumnPart(torch.zeros(1, dtype=torch.int64), 5, lambda *scores: scores)},
            "expected 2 int64 part.positive_ids",
        ),
        ({"part": ColumnPart(None, 5, lambda *scores: scores)}, "part.positive_ids: expected the ids of all queries'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    queries, passages, positives, _ = inputs(2, 5, torch.float32)
    given = {"passages": passages, "positives": positives, "temperature": 0.1}
    arguments: dict[str, Any] = {**given, **change}
    with pytest.raises(ValueError, match=message):
        info_nce(queries, **arguments)


def test_vectors_of_integers_are_refused() -> None:
    ones = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"of one floating dtype on one device, got torch\.int64"):
        info_nce(ones, ones, torch.tensor([0, 1]), temperature=0.1)


def test_numbers_of_numpy_are_numbers() -> None:
    queries, passages, positives, _ = inputs(2, 5, torch.float32)
    losses = [info_nce(queries, passages, positives, temperature=kind(0.5)).loss for kind in (float, np.float32)]
    assert torch.equal(losses[0], losses[1])


def test_the_reference_takes_no_part() -> None:
    queries, passages, positives, ids = inputs(7, 9, torch.float32)
    part = ColumnPart(ids[positives], 9, lambda *scores: scores)
    with pytest.raises(ValueError, match="backend='reference' takes no part"):
        info_nce(queries, passages, positives, temperature=0.1, passage_ids=ids, part=part, backend="reference")


@every_backend
def test_second_order_gradients_are_refused(backend: str) -> None:
    queries, passages, positives, _ = inputs(3, 5, torch.float32, device_of(backend))
    loss = info_nce(queries, passages, positives, temperature=0.1, dims=DIMS, backend=backend).loss
    with pytest.raises(RuntimeError, match=r"no second-order gradients: .* backend='reference'"):
        torch.autograd.grad(loss, queries, create_graph=True)


def test_the_reference_has_second_order_gradients() -> None:
    queries, passages, positives, _ = inputs(2, 3, torch.float64)

    def loss(*leaves: torch.Tensor) -> torch.Tensor:
        return info_nce(*leaves, positives, temperature=0.5, dims=[4, 2], backend="reference").loss

    assert torch.autograd.gradgradcheck(loss, (queries[:, :4], passages[:, :4]))
