"""Every backend of the loss against the float64 oracle: values, gradients, all options, odd sizes, figures."""

from __future__ import annotations

import pytest
import torch
from cases import (
    BACKENDS,
    DIMS,
    OPTIONS,
    WEIGHTS,
    assert_gradients_close,
    device_of,
    every_backend,
    every_case,
    inputs,
    options,
    ours_and_truth,
    outcome,
    uninterpreted,
)
from torch.nn.functional import normalize

from drama_dist.kernels import info_nce
from drama_dist.kernels.info_nce.problem import Contrast
from drama_dist.kernels.info_nce.reference import info_nce_reference

SHAPES = [(1, 1), (1, 5), (7, 9), (33, 70)]
# Triton's interpreter takes seconds for each: by default one with everything on, and one of each dtype.
INTERPRETED = {((7, 9), "excluded", torch.float32), ((33, 70), "same document", torch.float16)}


@every_case(SHAPES, OPTIONS, INTERPRETED)
def test_loss_and_gradients_equal_the_reference(
    backend: str, dtype: torch.dtype, shape: tuple[int, int], option: str
) -> None:
    (ours, gradients), (truth, exact) = ours_and_truth(backend, shape, dtype, option)
    tight = 1e-12 if dtype == torch.float64 else 2e-6
    loose = tight if dtype != torch.bfloat16 else 2e-4  # bfloat16's products are PyTorch's and the CPU's
    torch.testing.assert_close(ours.loss.double(), truth.loss, rtol=loose, atol=loose)
    torch.testing.assert_close(ours.per_dim.double(), truth.per_dim, rtol=loose, atol=loose)
    assert_gradients_close(gradients, exact, dtype)
    assert int(ours.masked) == int(truth.masked)


@uninterpreted
def test_float32_errs_no_more_than_plain_pytorch(backend: str) -> None:
    """Relative errors of loss and gradients, the mean of several draws; 3e-7 is two units in the last place."""
    errors = []
    for shape in ((33, 70), (29, 66), (35, 40), (20, 64)):
        queries, passages, positives, _ = inputs(*shape, torch.float32, device_of(backend))
        (ours, gradients), (truth, exact) = ours_and_truth(backend, shape, torch.float32, "plain", 0.02)
        problem = Contrast(positives_B=positives, dims=tuple(DIMS[::-1]), weights=tuple(WEIGHTS[::-1]))
        plain, *_ = info_nce_reference(queries, passages, 0.02, problem, torch.float32)
        theirs = torch.autograd.grad(2.5 * plain, (queries, passages))
        losses = [side.detach() for side in (ours.loss, plain, truth.loss)]
        triples = [losses, *zip(gradients, theirs, exact, strict=True)]
        errors.append([[float((side - its).norm() / its.norm()) for side in sides] for *sides, its in triples])
    for ours_error, plain_error in torch.tensor(errors).mean(0).tolist():
        assert ours_error <= plain_error + 3e-7


def test_the_comparison_notices_a_wrong_weight() -> None:
    queries, passages, positives, _ = inputs(9, 12, torch.float64)
    ours = info_nce(queries, passages, positives, temperature=0.1, dims=DIMS, dim_weights=WEIGHTS)
    swapped = info_nce(
        queries, passages, positives, temperature=0.1, dims=DIMS, dim_weights=WEIGHTS[::-1], backend="reference"
    )
    assert abs(float((ours.loss - swapped.loss).detach())) > 1e-3


@pytest.mark.parametrize("option", OPTIONS)
def test_gradients_are_those_of_finite_differences(option: str) -> None:
    queries, passages, positives, ids = inputs(4, 6, torch.float64)

    def loss(*leaves: torch.Tensor) -> torch.Tensor:
        return info_nce(*leaves, positives, temperature=0.3, dims=DIMS, **options(option, 4, 6, ids)).loss

    assert torch.autograd.gradcheck(loss, (queries, passages))


@pytest.mark.usefixtures("nan_in_new_memory")
@every_backend
def test_nothing_is_read_before_it_is_written(backend: str) -> None:
    assert torch.empty(3).isnan().all()
    (ours, gradients), (truth, exact) = ours_and_truth(backend, (7, 9), torch.float32, "excluded")
    torch.testing.assert_close(ours.loss.double(), truth.loss, rtol=2e-6, atol=2e-6)
    assert_gradients_close(gradients, exact, torch.float32)


@uninterpreted
def test_the_same_to_the_bit_when_run_again(backend: str) -> None:
    runs = [ours_and_truth(backend, (33, 70), torch.float32, "plain")[0] for _ in range(2)]
    assert torch.equal(runs[0][0].loss, runs[1][0].loss)
    assert all(torch.equal(first, second) for first, second in zip(runs[0][1], runs[1][1], strict=True))


@pytest.mark.parametrize("backend", ["reference", *BACKENDS], indirect=True)
def test_accuracy_margins_and_masked_pairs_are_those_of_the_scores(backend: str) -> None:
    queries, passages, positives, ids = inputs(20, 30, torch.float32, device_of(backend))
    result = info_nce(queries, passages, positives, temperature=0.5, dims=DIMS, passage_ids=ids, backend=backend)
    scores = normalize(queries[:, :33]) @ normalize(passages[:, :33]).T / 0.5
    positive = scores.gather(1, positives[:, None])[:, 0]
    same = (ids == ids[positives][:, None]).scatter(1, positives[:, None], True)
    negative = scores.masked_fill(same, -torch.inf).amax(1)
    assert float(result.accuracy) == pytest.approx(float((positive > negative).float().mean()))
    torch.testing.assert_close(result.margins.float(), (positive - negative).detach(), rtol=1e-5, atol=1e-5)
    assert int(result.masked) == int(same.sum()) - 20


@pytest.mark.parametrize("backend", ["reference", *BACKENDS], indirect=True)
def test_a_query_without_negatives_has_no_loss_no_gradient_and_no_margin(backend: str) -> None:
    queries, passages, _, _ = inputs(3, 4, torch.float32, device_of(backend))
    ids = torch.zeros(4, dtype=torch.int64, device=queries.device)
    positives = torch.arange(3, device=queries.device)
    given = {"temperature": 2.0, "dims": DIMS, "passage_ids": ids}
    result, gradients = outcome(backend, queries, passages, positives, **given)
    assert float(result.loss.detach()) == 0
    assert all(float(gradient.abs().max()) == 0 for gradient in gradients)
    assert result.margins.isnan().all() and float(result.accuracy) == 1


@every_backend
@pytest.mark.parametrize("temperature", [0.01, 1e-3])
def test_a_tiny_temperature_does_not_overflow(backend: str, temperature: float) -> None:
    (ours, gradients), (truth, _) = ours_and_truth(backend, (8, 16), torch.float32, "plain", temperature)
    torch.testing.assert_close(ours.loss.double(), truth.loss, rtol=1e-5, atol=1e-5)
    assert all(gradient.isfinite().all() for gradient in gradients)


@every_backend
def test_without_gradients_there_is_the_same_loss(backend: str) -> None:
    queries, passages, positives, _ = inputs(8, 16, torch.float32, device_of(backend))
    with_gradients = info_nce(queries, passages, positives, temperature=0.1, dims=DIMS, backend=backend)
    with torch.no_grad():
        without = info_nce(queries, passages, positives, temperature=0.1, dims=DIMS, backend=backend)
    assert torch.equal(with_gradients.loss, without.loss) and not without.loss.requires_grad


@every_backend
def test_excluded_passages_are_as_if_they_were_not_there(backend: str) -> None:
    """One query; the oracle is the same backend without the columns."""
    queries, passages, _, _ = inputs(1, 9, torch.float32, device_of(backend))
    ids, positives = torch.arange(9, device=queries.device), torch.tensor([4], device=queries.device)
    given = {"temperature": 0.1, "dims": DIMS}
    excluded = torch.tensor([[7, -1, 0]], device=queries.device)
    ours, gradients = outcome(backend, queries, passages, positives, passage_ids=ids, excluded_ids=excluded, **given)
    left = torch.tensor([1, 2, 3, 4, 5, 6, 8], device=queries.device)
    fewer, exact = outcome(backend, queries, passages[left], positives - 1, **given)
    torch.testing.assert_close(ours.loss, fewer.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients[1][left], exact[1], rtol=1e-5, atol=1e-6)
    assert int(ours.masked) == 2 and float(gradients[1][[0, 7]].abs().max()) == 0
    all_columns, _ = outcome(backend, queries, passages, positives, passage_ids=ids, **given)
    assert float((all_columns.loss - ours.loss).detach()) > 1e-4


@every_backend
def test_a_passage_that_is_not_a_number_shows_in_the_loss(backend: str) -> None:
    queries, passages, positives, _ = inputs(3, 40, torch.float32, device_of(backend))
    broken = passages.detach().clone()
    broken[next(column for column in range(40) if column not in positives)] = torch.nan
    assert info_nce(queries, broken, positives, temperature=0.1, backend=backend).loss.isnan()


@pytest.mark.parametrize("backend", ["eager", "cpu"], indirect=True)
def test_backends_on_the_cpu_do_not_round(backend: str) -> None:
    """Products of rounded vectors would differ in the third digit."""
    queries, passages, positives, _ = inputs(20, 30, torch.float32)
    given = {"temperature": 0.1, "dims": DIMS}
    runs = [outcome(backend, queries, passages, positives, rounded=rounded, **given) for rounded in (False, True)]
    assert torch.equal(runs[0][0].loss, runs[1][0].loss)
    assert all(torch.equal(*pair) for pair in zip(runs[0][1], runs[1][1], strict=True))
    halved = outcome(backend, queries.bfloat16().float(), passages.bfloat16().float(), positives, **given)
    assert not torch.equal(halved[0].loss, runs[0][0].loss)
