"""The loss against its float64 oracle: values, gradients, masks, extremes."""

from __future__ import annotations

import pytest
import torch

from drama_dist.kernels import info_nce
from drama_dist.kernels.reference import info_nce_reference

DIMS, WEIGHTS = [13, 7, 3], [0.5, 0.2, 0.3]


def inputs(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    queries = torch.randn(rows, 13, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    passages = (3 * torch.randn(columns, 13, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    positives = torch.randint(columns, (rows,), generator=generator)
    ids = torch.randint(max(1, columns // 2), (columns,), generator=generator)
    return queries, passages, positives, ids


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "same-document mask"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (7, 7), (31, 97), (64, 33)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.02])
def test_loss_and_gradients_equal_the_reference(
    shape: tuple[int, int], masked: bool, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drama_dist.kernels.info_nce_streaming._CHUNK_ELEMENTS", 200)  # several row chunks
    queries, passages, positives, ids = inputs(*shape)
    chosen = ids if masked else None
    ours = info_nce(
        queries, passages, positives, temperature=temperature, dims=DIMS, dim_weights=WEIGHTS, passage_ids=chosen
    )
    found = torch.autograd.grad(2.5 * ours.loss, (queries, passages))
    loss, per_dim = info_nce_reference(queries, passages, positives, temperature, DIMS, WEIGHTS, chosen)
    expected = torch.autograd.grad(2.5 * loss, (queries, passages))
    torch.testing.assert_close(ours.loss, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.per_dim, per_dim, rtol=1e-12, atol=1e-12)
    for own, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-12)


def test_the_comparison_notices_a_wrong_weight() -> None:
    queries, passages, positives, _ = inputs(9, 12)
    ours = info_nce(queries, passages, positives, temperature=0.1, dims=DIMS, dim_weights=WEIGHTS)
    swapped, _ = info_nce_reference(queries, passages, positives, 0.1, DIMS, WEIGHTS[::-1])
    assert abs(float(ours.loss - swapped)) > 1e-3


def test_float32_errs_no_more_than_eager_float32() -> None:
    queries, passages, positives, _ = inputs(65, 130, torch.float32)
    truth, _ = info_nce_reference(queries, passages, positives, 0.02, DIMS, WEIGHTS)
    eager = sum(
        weight
        * torch.nn.functional.cross_entropy(
            torch.nn.functional.normalize(queries[:, :dim], dim=1)
            @ torch.nn.functional.normalize(passages[:, :dim], dim=1).T
            / 0.02,
            positives,
        )
        for dim, weight in zip(DIMS, WEIGHTS, strict=True)
    )
    ours = info_nce(queries, passages, positives, temperature=0.02, dims=DIMS, dim_weights=WEIGHTS)
    assert abs(float(ours.loss - truth)) <= abs(float(eager - truth)) + 1e-5


def test_accuracy_and_margin_are_those_of_the_scores() -> None:
    queries, passages, positives, _ = inputs(20, 30)
    result = info_nce(queries, passages, positives, temperature=0.5, dims=DIMS)
    scores = torch.nn.functional.normalize(queries) @ torch.nn.functional.normalize(passages).T / 0.5
    own = scores.gather(1, positives[:, None])[:, 0]
    rivals = scores.scatter(1, positives[:, None], -torch.inf).amax(1)
    assert float(result.accuracy) == pytest.approx(float((own > rivals).double().mean()))
    assert float(result.margin) == pytest.approx(float((own - rivals).mean()))


def test_a_query_with_no_rival_has_no_loss_and_no_gradient() -> None:
    queries, passages, _, _ = inputs(3, 4)
    ids = torch.zeros(4, dtype=torch.int64)
    result = info_nce(queries, passages, torch.tensor([0, 1, 2]), temperature=0.1, dims=DIMS, passage_ids=ids)
    gradients = torch.autograd.grad(result.loss, (queries, passages))
    assert float(result.loss) == 0
    assert all(float(gradient.abs().max()) < 1e-12 for gradient in gradients)


def test_a_tiny_temperature_does_not_overflow() -> None:
    queries, passages, positives, _ = inputs(8, 16, torch.float32)
    result = info_nce(queries, passages, positives, temperature=1e-3, dims=DIMS)
    gradients = torch.autograd.grad(result.loss, (queries, passages))
    assert torch.isfinite(result.loss) and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"dims": [14]}, r"dims=\[14\]: expected different numbers from 1 to 13"),
        ({"dims": [3, 3]}, "different"),
        ({"dim_weights": [1.0, 2.0]}, "dim_weights"),
        ({"positives": torch.tensor([0, 9])}, "positives name columns 0..9 of 5"),
        ({"positives": torch.tensor([0])}, "expected 2 int64 positives"),
        ({"passage_ids": torch.tensor([0])}, "expected 5 passage ids"),
        ({"backend": "cuda"}, "backend='cuda'"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    queries, passages, positives, _ = inputs(2, 5)
    arguments = {"positives": positives, "temperature": 0.1, **change}
    with pytest.raises(ValueError, match=message):
        info_nce(queries, passages, **arguments)
