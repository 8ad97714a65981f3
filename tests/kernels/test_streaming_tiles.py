"""The GPU's chunks of rows: several of them, with shares of the columns, and inputs that are hard for them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_info_nce import DIMS, OPTIONS, WEIGHTS, allowed, device_of, inputs, ours_and_truth

from drama_dist.kernels import info_nce

streaming_tiles = pytest.importorskip("drama_dist.kernels.streaming_tiles")
DEVICE = device_of("triton")


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks, shares of columns, and tiles of 33 × 70 scores."""
    monkeypatch.setattr(streaming_tiles, "_SCORE_BYTES", 4 * 3 * 70 * 12)
    monkeypatch.setattr(streaming_tiles, "_ROW_STEP", 12)
    assert streaming_tiles.chunk_rows(33, 70, DIMS) == [12, 12, 9]
    for name in ("BY_ROWS", "BY_COLUMNS", "BY_ROWS_SMALL", "BY_COLUMNS_SMALL"):
        monkeypatch.setattr(streaming_tiles, name, {"BLOCK_R": 8, "BLOCK_C": 16, "num_warps": 1})
    assert streaming_tiles._shares(70, 2, 16)[0] == 2


@pytest.mark.usefixtures("several")
@pytest.mark.parametrize(
    ("option", "dtype"), [*((option, torch.float32) for option in OPTIONS), ("everything", torch.float16)], ids=str
)
def test_several_chunks_equal_the_reference(option: str, dtype: torch.dtype) -> None:
    (ours, found), (truth, expected) = ours_and_truth("triton", (33, 70), dtype, option, 0.05, DEVICE)
    torch.testing.assert_close(ours.loss.double(), truth.loss.double(), rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(ours.per_dim.double(), truth.per_dim.double(), rtol=2e-6, atol=2e-6)
    for own, theirs in zip(found, expected, strict=True):
        assert float((own - theirs).abs().max()) <= allowed(dtype) * float(theirs.abs().max()) + 1e-7


def both(queries: torch.Tensor, passages: torch.Tensor, temperature: float) -> list[list[torch.Tensor]]:
    """Loss and gradients of queries and passages, ours and the reference's."""
    found = []
    for backend in ("triton", "reference"):
        leaves = [side.detach().requires_grad_() for side in (queries, passages)]
        positives = torch.arange(len(queries), device=DEVICE)
        loss = info_nce(*leaves, positives, temperature=temperature, dims=DIMS, backend=backend).loss
        found.append([side.double() for side in (loss.detach(), *torch.autograd.grad(loss, leaves))])
    return found


def test_vectors_that_lie_across_memory() -> None:
    queries, passages, _, _ = inputs(7, 9, torch.float32, DEVICE)
    across = [side.detach().T.contiguous().T for side in (queries, passages)]
    assert across[0].stride(1) != 1
    for own, theirs in zip(*both(across[0], across[1], 0.1), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("several")
def test_queries_that_are_far_from_all_passages() -> None:
    """All scores near −1 / temperature, where e^(0 − log-sum-exp) of a column that does not exist is infinite."""
    near = torch.ones(1, inputs(1, 1, torch.float32)[0].shape[1]) + 0.01 * torch.randn(33 + 70, 1).sin()
    near = near + 0.01 * torch.randn(near.shape, generator=torch.Generator().manual_seed(0))
    queries, passages = -near[:33].to(DEVICE), near[33:].to(DEVICE)
    ours, truth = both(queries, passages, 0.005)
    assert all(each.isfinite().all() for each in ours)
    for own, theirs in zip(ours, truth, strict=True):
        assert float((own - theirs).abs().max()) <= 1e-4 * float(theirs.abs().max())


@pytest.mark.usefixtures("several")
def test_a_query_without_negatives_has_no_margin_however_hard() -> None:
    queries, passages, _, _ = inputs(3, 4, torch.float32, DEVICE)
    ids = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    positives = torch.arange(3, device=DEVICE)
    given = {"temperature": 2.0, "hardness": 10.0, "dims": DIMS, "dim_weights": WEIGHTS, "passage_ids": ids}
    result = info_nce(queries, passages, positives, backend="triton", **given)  # type: ignore[arg-type]
    assert result.margins is not None and result.margins.isnan().all()
