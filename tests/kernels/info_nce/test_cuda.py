"""The GPU's chunks of rows: several of them, with shares of the columns, and inputs that are hard for them."""

from __future__ import annotations

import pytest
import teachers
import torch
from cases import DIMS, OPTIONS, assert_gradients_close, device_of, inputs, ours_and_truth, outcome

from drama_dist.kernels.info_nce.tiles import Chunking

cuda = pytest.importorskip("drama_dist.kernels.info_nce.cuda")
gpu = pytest.importorskip("drama_dist.kernels.info_nce.gpu")
DEVICE = device_of("cuda")


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks, shares of columns, and tiles of 33 × 70 scores."""
    chunking = Chunking(4 * 3 * 70 * 12, most_rows=16384, row_step=12)
    monkeypatch.setattr(cuda.CUDATiles, "chunking", chunking)
    assert [(rows.start, rows.stop) for rows in chunking.slices(33, 70, len(DIMS))] == [(0, 12), (12, 24), (24, 33)]
    for name in ("BY_ROWS", "BY_COLUMNS", "BY_ROWS_SMALL", "BY_COLUMNS_SMALL"):
        monkeypatch.setattr(cuda, name, {"BLOCK_R": 8, "BLOCK_C": 16, "num_warps": 1})
    assert gpu.shares(70, 2, 16, cuda._PROGRAMS)[0] == 2


@pytest.mark.usefixtures("several")
@pytest.mark.parametrize(
    ("option", "dtype"),
    [
        ("excluded", torch.float32),
        *(pytest.param(option, torch.float32, marks=pytest.mark.slow) for option in OPTIONS if option != "excluded"),
        pytest.param("excluded", torch.float16, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_several_chunks_equal_the_reference(option: str, dtype: torch.dtype) -> None:
    (ours, gradients), (truth, exact) = ours_and_truth("cuda", (33, 70), dtype, option)
    torch.testing.assert_close(ours.loss.double(), truth.loss, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(ours.per_dim.double(), truth.per_dim, rtol=2e-6, atol=2e-6)
    assert_gradients_close(gradients, exact, dtype)


@pytest.mark.usefixtures("several")
@pytest.mark.parametrize("kind", ["both", pytest.param("sparse", marks=pytest.mark.slow)])
def test_several_chunks_of_soft_targets_equal_the_reference(kind: str) -> None:
    (ours, gradients), (truth, exact) = teachers.ours_and_truth("cuda", (33, 70), torch.float32, kind)
    teachers.assert_close(ours, truth, 2e-6)
    assert_gradients_close(gradients, exact, torch.float32)


def test_vectors_that_lie_across_memory() -> None:
    queries, passages, positives, _ = inputs(7, 9, torch.float32, DEVICE)
    across = [side.detach().T.contiguous().T for side in (queries, passages)]
    assert across[0].stride(1) != 1
    (ours, gradients), (truth, exact) = (
        outcome(name, *across, positives, temperature=0.1, dims=DIMS) for name in ("cuda", "reference")
    )
    torch.testing.assert_close(ours.loss.double(), truth.loss, rtol=1e-5, atol=1e-6)
    assert_gradients_close(gradients, exact, torch.float32)


@pytest.mark.usefixtures("several")
def test_queries_that_are_far_from_all_passages() -> None:
    """All scores near −1 / temperature, where e^(0 − log-sum-exp) of a column that does not exist is infinite."""
    near = torch.ones(1, inputs(1, 1, torch.float32)[0].shape[1]) + 0.01 * torch.randn(33 + 70, 1).sin()
    near = near + 0.01 * torch.randn(near.shape, generator=torch.Generator().manual_seed(0))
    queries, passages, positives = -near[:33].to(DEVICE), near[33:].to(DEVICE), torch.arange(33, device=DEVICE)
    (ours, gradients), (truth, exact) = (
        outcome(name, queries, passages, positives, temperature=0.005, dims=DIMS) for name in ("cuda", "reference")
    )
    assert all(bool(each.isfinite().all()) for each in (ours.loss, *gradients))
    for found, expected in ((ours.loss.double(), truth.loss), *zip(gradients, exact, strict=True)):
        assert float((found - expected).detach().abs().max()) <= 1e-4 * float(expected.detach().abs().max())
