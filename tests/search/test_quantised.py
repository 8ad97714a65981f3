"""int8 and binary search: against brute force in numpy, and against sentence-transformers' binary search."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sentence_transformers.util.quantization import quantize_embeddings, semantic_search_faiss

from drama_dist.encoder.pooling import matryoshka_cut_array
from drama_dist.search import dense, quantised
from drama_dist.search.dense import search_exact
from drama_dist.search.quantised import BinaryIndex, Int8Index, search_in
from drama_dist.search.shards import EmbeddingShards, write_shard


def unit(seed: int, rows: int, dim: int) -> np.ndarray:
    return matryoshka_cut_array(np.random.default_rng(seed).normal(size=(rows, dim)), dim)


def shards_of(folder: Path, vectors_NK: np.ndarray, rows: int = 7) -> EmbeddingShards:
    for index, start in enumerate(range(0, len(vectors_NK), rows)):
        write_shard(folder, index, vectors_NK[start : start + rows])
    return EmbeddingShards(folder)


def with_copies(vectors_NK: np.ndarray) -> np.ndarray:
    """The same with some vectors again in other places, which tie."""
    vectors_NK[5:20:3] = vectors_NK[1]
    vectors_NK[-4:] = vectors_NK[2:6]
    return vectors_NK


def in_order(scores_QN: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-scores_QN, axis=1, kind="stable")[:, :k]


def decoded_int8(vectors_NK: np.ndarray, sample_nK: np.ndarray) -> np.ndarray:
    """What 8-bit codes stand for: middles of 255 steps from the least to the greatest value of each component."""
    least, spread = sample_nK.min(0), np.ptp(sample_nK, axis=0)
    codes = np.clip((255 * ((vectors_NK - least) / spread)).astype(int), 0, 255)
    return least + (codes + 0.5) / 255 * spread.astype(float)


def by_signs(queries_QK: np.ndarray, vectors_NK: np.ndarray, k: int, candidates: int) -> tuple[np.ndarray, np.ndarray]:
    """Candidates by the number of signs that differ, then by dot products of queries and signs."""
    signs_NK, of_queries_QK = (np.where(each > 0, 1, -1) for each in (vectors_NK, queries_QK))
    nearest = np.sort(in_order(of_queries_QK @ signs_NK.T, candidates), axis=1)
    dots = np.take_along_axis(queries_QK.astype(float) @ signs_NK.T, nearest, 1).round(6)
    order = in_order(dots, k)
    return np.take_along_axis(dots, order, 1), np.take_along_axis(nearest, order, 1)


@pytest.mark.parametrize("dim", [5, 8, 13])
@pytest.mark.parametrize("k", [1, 6, 37, 90])
def test_int8_ranks_as_brute_force_over_decoded_vectors(tmp_path: Path, k: int, dim: int) -> None:
    passages, queries = with_copies(unit(1, 37, 13)), unit(2, 9, dim)
    scores, positions = search_in("int8", shards_of(tmp_path, passages), queries, k, 1)
    cut = matryoshka_cut_array(passages, dim)
    expected = queries.astype(float) @ decoded_int8(cut, cut).T
    np.testing.assert_array_equal(positions, in_order(expected.round(6), k))
    np.testing.assert_allclose(scores, np.take_along_axis(expected, positions, 1), atol=1e-6)
    assert scores.dtype == np.float32 and positions.dtype == np.int64 and scores.shape == (9, min(k, 37))
    assert np.abs(expected - queries @ cut.T).max() > 1e-4  # it is not float32 under another name


@pytest.mark.parametrize("multiplier", [1, 2, 100])
@pytest.mark.parametrize("dim", [8, 16, 24])
@pytest.mark.parametrize("k", [1, 6, 37, 90])
def test_binary_ranks_as_brute_force_over_signs(tmp_path: Path, k: int, dim: int, multiplier: int) -> None:
    passages, queries = with_copies(unit(3, 37, 24)), unit(4, 9, dim)
    scores, positions = search_in("binary", shards_of(tmp_path, passages), queries, k, multiplier)
    expected_scores, expected = by_signs(queries, passages[:, :dim], min(k, 37), min(multiplier * k, 37))
    np.testing.assert_array_equal(positions, expected)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5)
    assert scores.dtype == np.float32 and positions.dtype == np.int64


@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_neither_blocks_nor_queries_at_once_change_anything(
    tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    passages = np.random.default_rng(5).choice([-1.0, 1.0], (2500, 16))  # eight bits: very many tie for the last rank
    passages[:, 8:] = 1
    shards, queries = shards_of(tmp_path, matryoshka_cut_array(passages, 16), 1024), unit(6, 50, 16)
    whole = search_in(precision, shards, queries, 10, 4)
    monkeypatch.setattr(dense, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(quantised, "_BYTES_AT_ONCE", 1)
    for parts, all_at_once in zip(search_in(precision, shards, queries, 10, 4), whole, strict=True):
        np.testing.assert_array_equal(parts, all_at_once)
    if precision == "binary":
        np.testing.assert_array_equal(whole[1], by_signs(queries, shards.rows(range(2500)), 10, 40)[1])


def test_int8_takes_its_ranges_from_a_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passages, queries = unit(7, 300, 8), unit(8, 5, 8)
    monkeypatch.setattr(quantised, "CALIBRATION_PASSAGES", 20)
    shards = shards_of(tmp_path, passages, 100)
    _, positions = Int8Index(shards, 8).search(queries, 300)
    cut, sample = (matryoshka_cut_array(each, 8) for each in (passages, shards.sample(20, seed=0)))
    decoded = decoded_int8(cut, sample)
    np.testing.assert_array_equal(positions, in_order((queries.astype(float) @ decoded.T).round(6), 300))
    assert np.abs(decoded - passages).max() > 0.05  # values beyond the sample's range are cut off


def test_binary_agrees_with_sentence_transformers(tmp_path: Path) -> None:
    passages, queries = unit(9, 500, 64), unit(10, 20, 64)
    _, positions = BinaryIndex(shards_of(tmp_path, passages, 100), 64).search(queries, 10, 500)
    codes = quantize_embeddings(passages, "ubinary")
    theirs, _ = semantic_search_faiss(queries, codes, corpus_precision="ubinary", top_k=10, rescore_multiplier=50)
    assert positions.tolist() == [[hit["corpus_id"] for hit in hits] for hits in theirs]


def test_rescoring_more_candidates_comes_nearer_to_float(tmp_path: Path) -> None:
    passages, queries = unit(11, 2000, 128), unit(12, 40, 128)
    shards = shards_of(tmp_path, passages, 1000)
    _, exact = search_exact(shards, queries, 10, 128)

    def found(positions: np.ndarray) -> float:
        return float(np.mean([np.isin(*pair).mean() for pair in zip(exact, positions, strict=True)]))

    index = BinaryIndex(shards, 128)
    shares = [found(index.nearest(queries, 10)[1]), *(found(index.search(queries, 10, c)[1]) for c in (20, 100))]
    int8 = found(Int8Index(shards, 128).search(queries, 10)[1])
    assert shares[0] < shares[1] < shares[2] < int8 and int8 > 0.95
    assert (index.bytes_per_vector, Int8Index(shards, 128).bytes_per_vector) == (16, 128)


@pytest.mark.parametrize("precision", ["float32", "int8", "binary"])
def test_queries_that_are_not_finite_find_nothing(tmp_path: Path, precision: str) -> None:
    queries = unit(13, 3, 8)
    queries[1] = np.nan
    scores, positions = search_in(precision, shards_of(tmp_path, unit(14, 30, 8)), queries, 4, 2)
    assert (positions[1] == -1).all() and (scores[1] == 0).all() and (positions[[0, 2]] >= 0).all()
    none = search_in(precision, EmbeddingShards(tmp_path), queries[:0], 4, 2)
    assert none[0].shape == none[1].shape == (0, 4)


def test_bits_want_whole_bytes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluate\.precisions=binary: vectors of 12 components, which is not a mul"):
        search_in("binary", shards_of(tmp_path, unit(15, 9, 12)), unit(16, 2, 12), 3, 4)
    with pytest.raises(ValueError, match="the passages have 8 components"):
        BinaryIndex(EmbeddingShards(tmp_path), 8).search(unit(16, 2, 12), 3, 4)
