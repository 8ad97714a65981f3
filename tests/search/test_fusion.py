"""Fusion against dictionaries."""

from __future__ import annotations

from collections import defaultdict
from fractions import Fraction

import numpy as np
import pytest

from drama_dist.search.fusion import convex_mix, reciprocal_rank_fusion


def plain(rankings: list[np.ndarray], row: int, depth: int, rrf_k: int) -> list[tuple[int, Fraction]]:
    scores: dict[int, Fraction] = defaultdict(Fraction)
    for ranking in rankings:
        for rank, position in enumerate(ranking[row].tolist(), 1):
            if position >= 0:
                scores[position] += Fraction(1, rrf_k + rank)
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:depth]


@pytest.mark.parametrize("depth", [1, 10, 60])
def test_equals_exact_arithmetic_with_ties_by_position(depth: int) -> None:
    random = np.random.default_rng(4)
    rankings = [np.stack([random.permutation(40)[:k] for _ in range(25)]) for k in (20, 12, 15)]
    rankings[1][:, 8:] = -1
    scores, positions = reciprocal_rank_fusion(rankings, depth, rrf_k=3)  # a small k: many equal sums
    assert scores.shape == positions.shape == (25, depth) and positions.dtype == np.int64
    for row in range(25):
        expected = plain(rankings, row, depth, 3)
        assert [p for p in positions[row].tolist() if p >= 0] == [position for position, _ in expected]
        np.testing.assert_allclose(scores[row, : len(expected)], [float(score) for _, score in expected], rtol=1e-9)
        assert (positions[row, len(expected) :] == -1).all() and not scores[row, len(expected) :].any()


def test_one_ranking_keeps_its_order() -> None:
    ranking = np.array([[5, 2, 9], [1, 0, -1]])
    np.testing.assert_array_equal(reciprocal_rank_fusion([ranking], 3, 60)[1], ranking)


def test_agreement_beats_a_single_first_place() -> None:
    scores, positions = reciprocal_rank_fusion([np.array([[7, 1, 2]]), np.array([[8, 1, 3]])], 3, 60)
    assert positions[0].tolist() == [1, 7, 8]  # 7 and 8 tie
    assert scores[0, 0] == pytest.approx(2 / 62) and scores[0, 1] == scores[0, 2]


def test_what_cannot_be_fused_is_refused() -> None:
    with pytest.raises(ValueError, match="equal numbers"):
        reciprocal_rank_fusion([np.zeros((2, 1), int), np.zeros((3, 1), int)], 1, 60)
    with pytest.raises(ValueError, match="at least one"):
        reciprocal_rank_fusion([], 1, 60)
    with pytest.raises(ValueError, match="passage 4 twice for query 1"):
        reciprocal_rank_fusion([np.array([[1, 2, 3], [4, 2, 4]])], 1, 60)


def plain_mix(
    rankings: list[tuple[np.ndarray, np.ndarray, float | None]], weights: list[float], row: int, depth: int
) -> list[tuple[int, float]]:
    mixed: dict[int, float] = defaultdict(float)
    for (scores, positions, missed), weight in zip(rankings, weights, strict=True):
        hits = [(s, p) for s, p in zip(scores[row].tolist(), positions[row].tolist(), strict=True) if p >= 0]
        known = [score for score, _ in hits] + ([missed] if missed is not None and len(hits) < len(scores[row]) else [])
        best, last = max((score for score, _ in hits), default=0), min(known, default=0)
        for score, position in hits:
            mixed[position] += weight * ((score - last) / (best - last) if best > last else 1.0)
    return sorted(mixed.items(), key=lambda item: (-round(item[1], 12), item[0]))[:depth]


@pytest.mark.parametrize("depth", [1, 10, 60])
def test_the_mix_equals_a_dictionarys(depth: int) -> None:
    random = np.random.default_rng(5)
    positions = [np.stack([random.permutation(40)[:k] for _ in range(25)]) for k in (20, 12)]
    scores = [-np.sort(-random.normal(size=ranking.shape)).astype(np.float32) for ranking in positions]
    scores[1] = np.abs(scores[1])
    positions[1][:, 7:], scores[1][:, 7:] = -1, 0
    positions[1][3], scores[1][3] = -1, 0  # no hit at all
    positions[0][5, 12:], scores[0][5, 12:] = -1, 0  # an index that found fewer: nothing is known of the rest
    rankings = list(zip(scores, positions, (None, 0.0), strict=True))
    mixed, found = convex_mix(rankings, [0.6, 0.4], depth)
    for row in range(25):
        expected = plain_mix(rankings, [0.6, 0.4], row, depth)
        assert [p for p in found[row].tolist() if p >= 0] == [position for position, _ in expected]
        np.testing.assert_allclose(mixed[row, : len(expected)], [score for _, score in expected], rtol=1e-9)


def test_the_scale_of_scores_does_not_matter_to_the_mix_and_their_distances_do() -> None:
    dense = np.array([[0.9, 0.8, 0.1]]), np.array([[1, 2, 3]]), None
    lexical = np.array([[20.0, 5.0, 0.0]]), np.array([[2, 4, -1]]), 0.0
    scores, positions = convex_mix([dense, lexical], [0.5, 0.5], 4)
    assert positions[0].tolist() == [2, 1, 4, 3]
    np.testing.assert_allclose(scores[0], [0.5 * 0.875 + 0.5, 0.5, 0.125, 0], atol=1e-12)
    larger = convex_mix([(100 * dense[0] + 7, dense[1], None), lexical], [0.5, 0.5], 4)
    np.testing.assert_allclose(larger[0], scores)
    with pytest.raises(ValueError, match="passage 1 twice for query 0"):
        convex_mix([(dense[0], np.array([[1, 1, 2]]), None)], [1.0], 3)


def test_the_best_hit_has_all_of_its_weight_also_where_an_index_found_few() -> None:
    few = np.array([[-0.1, -0.3, 0.0]]), np.array([[5, 6, -1]]), None
    scores, positions = convex_mix([few], [1.0], 2)
    assert scores[0].tolist() == [1.0, 0.0] and positions[0].tolist() == [5, 6]
