"""The fused form: several chunks of rows, shares of the columns, tiles that end early, and what it may not hide."""

from __future__ import annotations

import pytest
import teachers
import torch
from cases import DIMS, OPTIONS, assert_gradients_close, device_of, inputs, ours_and_truth, outcome

from drama_dist.kernels import info_nce
from drama_dist.kernels.info_nce.tiles import Chunking

fused = pytest.importorskip("drama_dist.kernels.info_nce.fused")
gpu = pytest.importorskip("drama_dist.kernels.info_nce.gpu")
DEVICE = device_of("fused")


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three chunks of 33 rows, each with two shares of 70 columns, in tiles that do not divide them."""
    chunking = Chunking(4 * 3 * 70 * 16, most_rows=16384, row_step=16)
    monkeypatch.setattr(fused.FusedTiles, "chunking", chunking)
    assert [(rows.start, rows.stop) for rows in chunking.slices(33, 70, len(DIMS))] == [(0, 16), (16, 32), (32, 33)]
    tile = fused.Shape(16, 16, 16, 4, 1)
    monkeypatch.setattr(fused, "TILES", fused.Shapes(tile, tile, tile))
    assert gpu.shares(70, 1, 16, fused._PROGRAMS)[0] == 2


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
    (ours, gradients), (truth, exact) = ours_and_truth("fused", (33, 70), dtype, option)
    torch.testing.assert_close(ours.loss.double(), truth.loss, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(ours.per_dim.double(), truth.per_dim, rtol=2e-6, atol=2e-6)
    assert_gradients_close(gradients, exact, dtype)
    assert int(ours.masked) == int(truth.masked)


@pytest.mark.usefixtures("several")
@pytest.mark.parametrize("kind", ["both", pytest.param("sparse", marks=pytest.mark.slow)])
def test_several_chunks_of_soft_targets_equal_the_reference(kind: str) -> None:
    (ours, gradients), (truth, exact) = teachers.ours_and_truth("fused", (33, 70), torch.float32, kind)
    teachers.assert_close(ours, truth, 2e-6)
    assert_gradients_close(gradients, exact, torch.float32)


def test_what_is_hidden_stays_so_beside_vectors_of_all_lengths() -> None:
    """A hidden column's score must stay below all others, whatever the norms: long, short, and no vectors."""
    queries, passages, positives, ids = inputs(6, 12, torch.float32, DEVICE)
    lengths = torch.tensor([1e9, 1e-9, 0.0, 1.0, 1e9, 1e-9], device=DEVICE)
    queries = queries.detach() * lengths[:, None]
    passages = passages.detach() * lengths.repeat(2)[:, None]
    given = {"temperature": 1.0, "dims": DIMS, "passage_ids": ids % 3}
    ours, truth = (info_nce(queries, passages, positives, backend=name, **given) for name in ("fused", "reference"))
    torch.testing.assert_close(ours.per_dim.double(), truth.per_dim, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(ours.margins.double(), truth.margins, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert int(ours.masked) == int(truth.masked) > 0


def test_the_comparison_notices_hidden_columns_that_count() -> None:
    queries, passages, positives, ids = inputs(6, 12, torch.float32, DEVICE)
    given = {"temperature": 1.0, "dims": DIMS}
    hidden, _ = outcome("fused", queries, passages, positives, passage_ids=ids % 3, **given)
    counted, _ = outcome("fused", queries, passages, positives, **given)
    assert float((counted.loss - hidden.loss).detach()) > 1e-2


def test_equal_scores_are_equal_to_the_last_bit() -> None:
    """A passage that comes twice under two ids: no margin between the two."""
    _, passages, _, _ = inputs(9, 12, torch.float32, DEVICE)
    twice = torch.cat([passages.detach(), passages.detach()])
    positives = torch.arange(9, device=DEVICE)
    result = info_nce(twice[:9], twice, positives, temperature=0.05, dims=DIMS, backend="fused")
    assert result.margins.eq(0).all()
