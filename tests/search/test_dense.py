"""Dense search: exact over shards against a plain sort, and indexes of faiss against exact search."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import faiss
import numpy as np
import pytest

from drama_dist.encoder.pooling import matryoshka_cut_array
from drama_dist.search import dense
from drama_dist.search.dense import (
    build_index,
    check_factory,
    open_index,
    recall_against_exact,
    search_exact,
    search_folder,
)
from drama_dist.search.ranking import top_positions
from drama_dist.search.shards import EmbeddingShards, write_shard


def shards_of(folder: Path, vectors_NK: np.ndarray, rows: int) -> EmbeddingShards:
    """The vectors as shards of `rows` each."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, start in enumerate(range(0, len(vectors_NK), rows)):
        write_shard(folder, index, vectors_NK[start : start + rows])
    return EmbeddingShards(folder)


def plain(scores_QN: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-scores_QN, axis=1, kind="stable")[:, :k]


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def clustered(count: int, dim: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around 40 centres, and 50 queries around the same."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(40, dim))
    rows = centres[random.integers(0, 40, count + 50)] + 0.5 * random.normal(size=(count + 50, dim))
    return unit(rows[:count]), unit(rows[count:])


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "_BLOCK_BYTES", 1)  # the least: 1,024 rows
    monkeypatch.setattr(dense, "_QUERIES_AT_ONCE", 700)


@pytest.mark.parametrize("rows", [1, 7, 50])
@pytest.mark.parametrize("k", [1, 7, 50, 500])
def test_ranks_as_a_plain_sort_does_with_ties_by_position(tmp_path: Path, k: int, rows: int) -> None:
    random = np.random.default_rng(3)
    passages = random.integers(-2, 3, (50, 4)).astype(np.float32)  # small integers: many exact ties
    queries = random.integers(-2, 3, (40, 4)).astype(np.float32)
    scores, positions = search_exact(shards_of(tmp_path, passages, rows), queries, k)
    expected = queries @ passages.T
    assert scores.dtype == np.float32 and positions.dtype == np.int64
    np.testing.assert_array_equal(positions, plain(expected, k))
    np.testing.assert_array_equal(scores, np.take_along_axis(expected, positions, 1))
    assert scores.shape == (40, min(k, 50))


@pytest.mark.parametrize(("queries", "dim"), [(90, 3), (1501, 192)], ids=["dot products", "matrix products"])
def test_ties_keep_their_order_across_shards_and_blocks(
    tmp_path: Path, small_blocks: None, queries: int, dim: int
) -> None:
    random = np.random.default_rng(5)
    passages = random.integers(-1, 2, (2500, dim)).astype(np.float32)
    passages[1020:1030] = passages[-1] = passages[0]
    queries_QK = random.integers(-1, 2, (queries, dim)).astype(np.float32)
    queries_QK[0] = passages[0]
    _, positions = search_exact(shards_of(tmp_path, passages, 1024), queries_QK, 20)
    np.testing.assert_array_equal(positions, plain(queries_QK @ passages.T, 20))


def test_equals_a_sort_in_double_precision_with_duplicates_on_both_sides_of_a_border(
    tmp_path: Path, small_blocks: None
) -> None:
    passages, queries = clustered(3001, 48)
    passages[1500:3000:3] = passages[0:1500:3]
    _, positions = search_exact(shards_of(tmp_path, passages, 700), queries, 100)
    np.testing.assert_array_equal(positions, plain(queries.astype(np.float64) @ passages.T.astype(np.float64), 100))
    nearest_copies = {tuple(row[:2]) for row in positions.tolist() if row[1] - row[0] == 1500}
    assert nearest_copies  # some ranking begins with two equal passages, the earlier one first


@pytest.mark.parametrize("queries", [3, 700], ids=["dot products", "matrix products"])
def test_scores_are_those_of_a_flat_index_in_memory_whatever_the_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, queries: int
) -> None:
    passages, _ = clustered(4500, 200)
    queries_QK, _ = clustered(queries, 200, seed=1)
    flat = faiss.IndexFlatIP(200)
    flat.add(passages)
    expected, _ = flat.search(queries_QK, 30)
    shards = shards_of(tmp_path, passages, 999)
    for block_bytes in (1, 2**21, 2**24):
        monkeypatch.setattr(dense, "_BLOCK_BYTES", block_bytes)
        np.testing.assert_array_equal(search_exact(shards, queries_QK, 30)[0], expected)


def test_a_matryoshka_dim_is_that_of_vectors_cut_beforehand(tmp_path: Path, small_blocks: None) -> None:
    passages, queries = clustered(1500, 32)
    cut = shards_of(tmp_path / "cut", matryoshka_cut_array(passages, 5), 400)
    queries_QK = matryoshka_cut_array(queries, 5)
    found = search_exact(shards_of(tmp_path / "full", passages, 400), queries_QK, 10, dim=5)
    for array, expected in zip(found, search_exact(cut, queries_QK, 10), strict=True):
        np.testing.assert_array_equal(array, expected)


def test_what_is_not_finite_is_never_returned(tmp_path: Path) -> None:
    passages = np.eye(5, dtype=np.float32)
    passages[3, 0] = np.nan
    queries = np.array([[1, 0.5, 0, 0, 0], [np.nan, 0, 0, 0, 0]], np.float32)
    scores, positions = search_exact(shards_of(tmp_path, passages, 2), queries, 5)
    assert positions.tolist() == [[0, 1, 2, 4, -1], [-1] * 5]
    assert scores.tolist() == [[1, 0.5, 0, 0, 0], [0] * 5]


def test_one_vector_no_query_and_no_k(tmp_path: Path) -> None:
    one = shards_of(tmp_path, np.array([[0.6, 0.8]], np.float32), 3)
    scores, positions = search_exact(one, np.array([[1.0, 0.0]], np.float32), 9)
    assert scores.tolist() == [[np.float32(0.6)]] and positions.tolist() == [[0]]
    for queries, k in (((0, 2), 1), ((3, 2), 0)):
        scores, positions = search_exact(one, np.ones(queries, np.float32), k)
        assert scores.shape == positions.shape == (queries[0], k)


def test_queries_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    shards = shards_of(tmp_path, np.eye(4, dtype=np.float32), 2)
    with pytest.raises(ValueError, match=r"\(1, 3\): the passages have 4 components"):
        search_exact(shards, np.ones((1, 3), np.float32), 1)
    with pytest.raises(ValueError, match="dim=5: these vectors have 4 components"):
        search_exact(shards, np.ones((1, 5), np.float32), 1, dim=5)


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for index in range(100):  # 1 MB each
        write_shard(tmp_path, index, random.standard_normal((4000, 64), dtype=np.float32))
    code = f"""if True:
        import sys, numpy as np
        from pathlib import Path
        from drama_dist.search.dense import search_exact
        from drama_dist.search.shards import EmbeddingShards
        def peak(): return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
        shards, queries = EmbeddingShards(Path({str(tmp_path)!r})), np.ones((50, 64), np.float32)
        search_exact(EmbeddingShards(Path({str(tmp_path)!r})), queries[:1], 1)
        before = peak(); search_exact(shards, queries, 100); searched = peak()
        everything = shards.sample(10**9, 0); print(searched - before, peak() - searched)"""
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    searching, loading = (int(word) / 1000 for word in answer.stdout.split())
    assert searching < 30 < 70 < loading  # MB


def test_top_positions_equals_a_plain_sort() -> None:
    random = np.random.default_rng(2)
    for count, k in [(1, 1), (10, 3), (10, 10), (10, 40), (200, 17), (5, 0)]:
        scores = random.integers(0, 4, count).astype(np.float32)
        np.testing.assert_array_equal(top_positions(scores, k), plain(scores[None], k)[0])


@pytest.mark.parametrize(
    ("factory", "parameters", "least"),
    [
        ("Flat", "", 1.0),
        ("HNSW16", "efSearch=128", 0.95),
        ("IVF16,Flat", "nprobe=16", 1.0),
        ("IVF16,PQ8np", "nprobe=4", 0.45),
        ("PCA16,IVF16,SQ8", "nprobe=4", 0.35),
        ("SQ8", "", 0.95),
    ],
)
def test_an_index_finds_most_of_what_exact_search_finds_also_when_read_again(
    tmp_path: Path, factory: str, parameters: str, least: float
) -> None:
    passages, queries = clustered(3000, 32)
    shards = shards_of(tmp_path, passages, 700)
    index = build_index(shards, factory, tmp_path, parameters)
    assert (len(index), index.dim) == (3000, 32)
    recalls = recall_against_exact(index, shards, queries)
    assert set(recalls) == {10, 100} and all(least <= recall <= 1 for recall in recalls.values())
    for array, expected in zip(open_index(tmp_path).search(queries, 10), index.search(queries, 10), strict=True):
        np.testing.assert_array_equal(array, expected)
    assert {path.name for path in tmp_path.iterdir()} == {*(f"shard-0000{n}.npy" for n in range(5)), "index.faiss"}


def test_recall_is_the_share_of_the_exact_hits(tmp_path: Path) -> None:
    passages, queries = clustered(600, 16)
    shards = shards_of(tmp_path, passages, 100)
    index = build_index(shards, "IVF16,Flat", tmp_path)  # visits one list of 16
    recalls = recall_against_exact(index, shards, queries, (5, 50))
    for k, recall in recalls.items():
        exact = plain(queries @ passages.T, k)
        _, found = index.search(queries, k)
        assert recall == pytest.approx(
            sum(len(set(a) & set(b)) for a, b in zip(exact, found, strict=True)) / exact.size
        )
    assert recalls[50] < recalls[5] < 1


def test_fewer_hits_than_asked_for_have_no_position(tmp_path: Path) -> None:
    passages, queries = clustered(64, 8)
    index = build_index(shards_of(tmp_path, passages, 64), "IVF8,Flat", tmp_path)
    scores, positions = index.search(queries, 64)
    assert (positions[:, -1] == -1).all() and (scores[positions < 0] == 0).all() and (positions[:, 0] >= 0).all()
    assert index.search(queries, 1000)[0].shape == (50, 64) and index.search(queries[:0], 3)[0].shape == (0, 3)
    with pytest.raises(ValueError, match="8 components"):
        index.search(queries[:, :5], 3)


def test_a_folder_is_searched_with_its_index_but_smaller_dims_exactly(tmp_path: Path) -> None:
    passages, queries = clustered(600, 16)
    shards = shards_of(tmp_path, passages, 250)
    cut = matryoshka_cut_array(queries, 6)
    exact = search_folder(tmp_path, None, queries, 50)[1]
    np.testing.assert_array_equal(exact, search_exact(shards, queries, 50)[1])
    index = build_index(shards, "IVF16,Flat", tmp_path)
    np.testing.assert_array_equal(search_folder(tmp_path, tmp_path, queries, 50)[1], index.search(queries, 50)[1])
    assert (search_folder(tmp_path, tmp_path, queries, 50)[1] != exact).any()
    np.testing.assert_array_equal(search_folder(tmp_path, tmp_path, cut, 50)[1], search_exact(shards, cut, 50, 6)[1])


def test_an_index_that_is_missing_or_cut_short_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="drama encode"):
        open_index(tmp_path)
    build_index(shards_of(tmp_path, clustered(300, 8)[0], 300), "HNSW8", tmp_path)
    path = tmp_path / "index.faiss"
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=r"index\.faiss: not an index that faiss reads \(.*\); encode again"):
        open_index(tmp_path)


@pytest.mark.parametrize(
    ("factory", "parameters", "message"),
    [
        ("HNSWX", "", "encode.index='HNSWX': faiss refuses it: could not parse index string HNSWX"),
        ("", "", "encode.index='': faiss refuses it: could not parse"),
        ("IVF16,PQ64", "", "encode.index='IVF16,PQ64': faiss refuses it: The dimension of the vector .* multiple"),
        ("HNSW32_PQ4", "", "encode.index='HNSW32_PQ4': faiss refuses it: this kind of index has no inner product"),
        ("LSH", "", "encode.index='LSH': faiss refuses it"),
        ("HNSW8", "nprobe=4", "encode.index_search='nprobe=4': faiss refuses it: .*could not set parameter nprobe"),
        ("IVF16,Flat", "nprobe", "encode.index_search='nprobe': faiss refuses it: could not interpret"),
    ],
)
def test_a_factory_string_that_does_not_work_names_its_setting(factory: str, parameters: str, message: str) -> None:
    check_factory("IVF16,PQ20", 100, "nprobe=4")
    with pytest.raises(ValueError, match=message) as raised:
        check_factory(factory, 100, parameters)
    assert "\n" not in str(raised.value) and ".cpp" not in str(raised.value)


@pytest.mark.parametrize(("factory", "reason"), [("PQ4", r"training points \(90\)"), ("IDMap,Flat", "add_with_ids")])
def test_an_index_that_cannot_be_built_names_its_setting(tmp_path: Path, factory: str, reason: str) -> None:
    shards = shards_of(tmp_path, clustered(90, 8)[0], 40)
    with pytest.raises(ValueError, match=rf"encode\.index='{factory}': faiss refuses it: .*{reason}"):
        build_index(shards, factory, tmp_path)
    assert not list(tmp_path.glob("index*"))


def test_training_takes_a_bounded_sample_that_is_the_same_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = shards_of(tmp_path, clustered(3000, 8)[0], 700)
    monkeypatch.setattr(dense, "_TRAINING_ROWS", 500)
    asked: list[int] = []
    sample = EmbeddingShards.sample
    monkeypatch.setattr(EmbeddingShards, "sample", lambda self, n, seed: asked.append(n) or sample(self, n, seed))
    build_index(shards, "IVF4,PQ4np", tmp_path)
    first = (tmp_path / "index.faiss").read_bytes()
    build_index(shards, "IVF4,PQ4np", tmp_path)
    assert (tmp_path / "index.faiss").read_bytes() == first
    build_index(shards, "IVF16,Flat", tmp_path)
    monkeypatch.setattr(dense, "_TRAINING_BYTES", 4 * 8 * 600)
    build_index(shards, "IVF16,Flat", tmp_path)
    assert asked == [500, 500, 1024, 600]


@pytest.mark.parametrize("first", ["import torch", "from drama_dist.search.dense import search_exact"])
def test_faiss_and_torch_live_together_in_either_order(first: str) -> None:
    code = (
        f"{first}\nimport torch\nfrom drama_dist.search.dense import search_exact, faiss\n"
        "a = torch.randn(300, 64); b = (a @ a.T).sum()\n"
        "faiss.knn(a.numpy(), a.numpy(), 5); print(float((a @ a.T).sum() - b))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0 and answer.stdout.strip() == "0.0", answer.stderr
