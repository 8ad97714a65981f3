"""Dense search against a plain sort."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest

from drama_dist.search.dense import DenseIndex
from drama_dist.search.ranking import top_positions


def plain(scores_QN: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-scores_QN, axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("k", [1, 7, 50, 500])
def test_ranks_as_a_plain_sort_does_with_ties_by_position(k: int) -> None:
    random = np.random.default_rng(3)
    passages = random.integers(-2, 3, (50, 4)).astype(np.float32)  # small integers: many exact ties
    queries = random.integers(-2, 3, (40, 4)).astype(np.float32)
    scores, positions = DenseIndex(passages).search(queries, k)
    expected = queries @ passages.T
    assert scores.dtype == np.float32 and positions.dtype == np.int64
    np.testing.assert_array_equal(positions, plain(expected, k))
    np.testing.assert_array_equal(scores, np.take_along_axis(expected, positions, 1))
    assert scores.shape == (40, min(k, 50))


def test_many_queries_take_the_other_path_of_faiss_and_rank_alike() -> None:
    random = np.random.default_rng(5)
    passages = random.integers(-1, 2, (3000, 3)).astype(np.float32)
    queries = random.integers(-1, 2, (100, 3)).astype(np.float32)
    _, positions = DenseIndex(passages).search(queries, 20)
    np.testing.assert_array_equal(positions, plain(queries @ passages.T, 20))


def test_written_and_read_it_finds_the_same(tmp_path: Path) -> None:
    vectors = np.random.default_rng(1).normal(size=(30, 8)).astype(np.float32)
    index = DenseIndex(vectors)
    index.write(tmp_path / "index.faiss")
    again = DenseIndex.read(tmp_path / "index.faiss")
    assert (len(again), again.dim) == (30, 8)
    for found, expected in zip(again.search(vectors, 5), index.search(vectors, 5), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert [path.name for path in tmp_path.iterdir()] == ["index.faiss"]


def test_another_kind_of_index_is_refused(tmp_path: Path) -> None:
    other = faiss.IndexFlatL2(4)
    other.add(np.ones((2, 4), np.float32))
    faiss.write_index(other, str(tmp_path / "l2.faiss"))
    with pytest.raises(ValueError, match="flat inner-product"):
        DenseIndex.read(tmp_path / "l2.faiss")


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        DenseIndex(np.zeros((0, 4), np.float32))
    with pytest.raises(ValueError, match="4 components"):
        DenseIndex(np.eye(4, dtype=np.float32)).search(np.ones((1, 3), np.float32), 1)
    scores, positions = DenseIndex(np.eye(4, dtype=np.float32)).search(np.zeros((0, 4), np.float32), 2)
    assert scores.shape == positions.shape == (0, 2)


def test_top_positions_equals_a_plain_sort() -> None:
    random = np.random.default_rng(2)
    for count, k in [(1, 1), (10, 3), (10, 10), (10, 40), (200, 17), (5, 0)]:
        scores = random.integers(0, 4, count).astype(np.float32)
        np.testing.assert_array_equal(top_positions(scores, k), plain(scores[None], k)[0])


@pytest.mark.parametrize("first", ["import torch", "from drama_dist.search.dense import DenseIndex"])
def test_faiss_and_torch_live_together_in_either_order(first: str) -> None:
    code = (
        f"{first}\nimport torch, numpy as np\nfrom drama_dist.search.dense import DenseIndex\n"
        "a = torch.randn(300, 64); b = (a @ a.T).sum()\n"
        "DenseIndex(a.numpy()).search(a.numpy(), 5); print(float((a @ a.T).sum() - b))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0 and answer.stdout.strip() == "0.0", answer.stderr
