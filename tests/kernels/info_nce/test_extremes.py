"""Inputs at the edges of their precision: zero vectors, tiny and huge values; and autocast."""

from __future__ import annotations

import pytest
import torch
from cases import BACKENDS, DIMS, WEIGHTS, allowed, assert_gradients_close, device_of, every_backend, inputs, outcome

from drama_dist.kernels import info_nce

GIVEN = {"temperature": 0.05, "dims": DIMS, "dim_weights": WEIGHTS}
every_backend_and_dtype = pytest.mark.parametrize(
    ("backend", "dtype"),
    [(backend, dtype) for backend, dtypes in BACKENDS.items() for dtype in dtypes],
    indirect=["backend"],
    ids=str,
)


def sides_of(backend: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Nine queries, whose positives are the first nine of twelve passages."""
    queries, passages, _, _ = inputs(9, 12, dtype, device_of(backend))
    return queries.detach().clone(), passages.detach().clone(), torch.arange(9, device=queries.device)


def assert_as_the_reference(
    backend: str, queries: torch.Tensor, passages: torch.Tensor, positives: torch.Tensor
) -> list[torch.Tensor]:
    """Returns the gradients, every row's compared by itself: some are larger than others by orders of magnitude."""
    ours, gradients = outcome(backend, queries, passages, positives, **GIVEN)
    truth, exact = outcome("reference", queries, passages, positives, **GIVEN)
    close = 2e-6 if queries.dtype != torch.bfloat16 else 5e-4
    torch.testing.assert_close(ours.loss.double(), truth.loss, rtol=close, atol=close)
    for gradient, its in zip(gradients, exact, strict=True):
        bounds = 3 * allowed(queries.dtype) * its.abs().amax(1, keepdim=True)
        assert bool(((gradient - its).abs() <= bounds + 1e-7).all())
    return gradients


@every_backend_and_dtype
def test_zero_vectors_score_nothing_and_get_no_gradient(backend: str, dtype: torch.dtype) -> None:
    queries, passages, positives = sides_of(backend, dtype)
    queries[2] = passages[3] = passages[11] = 0
    queries[4, :5] = passages[5, :20] = 0  # zero in some dims only
    gradients = assert_as_the_reference(backend, queries, passages, positives)
    zeros = [gradients[0][2], gradients[1][3], gradients[1][11], gradients[0][4, :0]]
    assert all(bool((row == 0).all()) for row in zeros) and float(gradients[0][4].abs().max()) > 0
    alone = info_nce(queries[2:3], passages, positives[:1], temperature=0.05, dims=DIMS, backend=backend)
    torch.testing.assert_close(alone.per_dim.double(), torch.full_like(alone.per_dim, 12).double().log())


@every_backend
def test_vectors_up_to_the_floor_are_zero_and_longer_ones_are_not(backend: str) -> None:
    queries, passages, positives = sides_of(backend, torch.float32)
    queries[1] *= 0.9e-12 / queries[1].norm()
    queries[2] *= 1e-10 / queries[2].norm()
    gradients = assert_as_the_reference(backend, queries, passages, positives)
    assert float(gradients[0][1].abs().max()) == 0 and float(gradients[0][2].abs().max()) > 1e6


@every_backend_and_dtype
def test_short_vectors_have_the_gradients_of_long_ones(backend: str, dtype: torch.dtype) -> None:
    """Norms of a few thousandths, and of a few hundred thousandths: float16's subnormal numbers."""
    queries, passages, positives = sides_of(backend, dtype)
    queries, passages = queries * 2**-10, passages * 2**-9
    queries[:3] *= 2**-3
    gradients = assert_as_the_reference(backend, queries, passages, positives)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


@every_backend_and_dtype
def test_a_short_prefix_has_the_gradients_of_a_long_one(backend: str, dtype: torch.dtype) -> None:
    """The first dim's components are much smaller than the rest: its gradients are large, and float16 holds them."""
    queries, passages, positives = sides_of(backend, dtype)
    queries[:, : min(DIMS)] *= 5e-3
    passages[:, : min(DIMS)] *= 5e-3
    gradients = assert_as_the_reference(backend, queries, passages, positives)
    assert float(gradients[0].abs().max()) > 100


@every_backend
def test_the_smallest_of_float16_give_no_nan(backend: str) -> None:
    queries, passages, positives = sides_of(backend, torch.float16)
    queries, passages = queries.sign() * 6e-8, passages.sign() * 6e-8
    result, gradients = outcome(backend, queries, passages, positives, **GIVEN)
    truth = info_nce(queries.sign(), passages.sign(), positives, backend="reference", **GIVEN)  # type: ignore[arg-type]
    torch.testing.assert_close(result.loss.double(), truth.loss.double(), rtol=2e-6, atol=2e-6)
    assert not any(bool(gradient.isnan().any()) for gradient in gradients)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("eager", torch.float32),
        ("cpu", torch.float32),
        ("cpu", torch.bfloat16),
        ("cuda", torch.float32),
        ("fused", torch.float32),
    ],
    indirect=["backend"],
    ids=str,
)
@pytest.mark.parametrize("power", [70, 120])
def test_huge_values_have_the_loss_of_ordinary_ones(backend: str, dtype: torch.dtype, power: int) -> None:
    """2⁷⁰ is 1e21: squares overflow. Gradients are smaller by as much as vectors are larger."""
    queries, passages, positives = sides_of(backend, dtype)
    ordinary, expected = outcome(backend, queries, passages, positives, **GIVEN)
    queries[[0, 5]] *= 2.0**power
    passages[[1, 5, 11]] *= 2.0**power
    result, gradients = outcome(backend, queries, passages, positives, **GIVEN)
    torch.testing.assert_close(result.loss, ordinary.loss, rtol=1e-6, atol=1e-6)
    gradients[0][[0, 5]] *= 2.0**power
    gradients[1][[1, 5, 11]] *= 2.0**power
    assert_gradients_close(gradients, expected, dtype)


@every_backend
def test_infinite_values_show_in_the_loss(backend: str) -> None:
    queries, passages, positives = sides_of(backend, torch.float32)
    passages[10, 3] = torch.inf
    assert bool(info_nce(queries, passages, positives, backend=backend, **GIVEN).loss.isnan())  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["reference", *BACKENDS], indirect=True)
def test_autocast_changes_nothing(backend: str) -> None:
    queries, passages, positives = sides_of(backend, torch.float32)
    plain = outcome(backend, queries, passages, positives, **GIVEN)
    with torch.autocast(queries.device.type, torch.bfloat16):
        cast = outcome(backend, queries, passages, positives, **GIVEN)
        assert (queries @ passages.T).dtype == torch.bfloat16
    assert torch.equal(plain[0].loss, cast[0].loss)
    assert all(torch.equal(one, other) for one, other in zip(plain[1], cast[1], strict=True))
