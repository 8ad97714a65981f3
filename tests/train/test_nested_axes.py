"""The learnt turn: whole vectors rank as before, and prefixes more as whole vectors do than with principal axes."""

from __future__ import annotations

import numpy as np

from drama_dist.encoder.pooling import matryoshka_cut_array, unit_rows
from drama_dist.train.nested_axes import nested_turn

K, PREFIX = 24, 6


def texts(count: int, seed: int) -> np.ndarray:
    """The first six components are long and almost the same in all texts; the next six say which texts are alike."""
    chance = np.random.default_rng(seed)
    common = np.abs(1 + 0.05 * chance.standard_normal((count, PREFIX)))
    own = chance.standard_normal((count, K - PREFIX)) * np.repeat([0.3, 0.02], [PREFIX, K - 2 * PREFIX])
    return unit_rows(np.hstack([common, own]))


def overlap_of_prefixes(queries: np.ndarray, passages: np.ndarray, turn: np.ndarray) -> float:
    """The share of the ten nearest passages by whole vectors that are among the ten nearest by prefixes."""
    prefixes = [matryoshka_cut_array(each @ turn, PREFIX) for each in (queries, passages)]
    whole = np.argsort(-queries @ passages.T)[:, :10]
    short = np.argsort(-prefixes[0] @ prefixes[1].T)[:, :10]
    return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(whole, short, strict=True)]))


def test_prefixes_rank_more_as_whole_vectors_do() -> None:
    turn = nested_turn(texts(300, 0), texts(500, 1), [K, PREFIX], seed=1)
    queries, passages = texts(50, 2), texts(200, 3)
    before = overlap_of_prefixes(queries, passages, np.eye(K, dtype=np.float32))
    after = overlap_of_prefixes(queries, passages, turn)
    assert before < 0.1
    assert after > 0.4
    np.testing.assert_allclose(turn.T @ turn, np.eye(K), atol=1e-5)
    np.testing.assert_allclose((queries @ turn) @ (passages @ turn).T, queries @ passages.T, atol=1e-5)


def test_a_seed_gives_the_same_turn_of_fewer_texts_than_a_step_takes() -> None:
    queries, passages = texts(7, 4), texts(11, 5)
    turns = [nested_turn(queries, passages, [K, 12, PREFIX], seed) for seed in (1, 1)]
    np.testing.assert_array_equal(*turns)
    assert not np.allclose(turns[0], np.eye(K), atol=1e-3)


def test_without_shorter_dims_nothing_is_turned() -> None:
    np.testing.assert_array_equal(nested_turn(texts(7, 6), texts(9, 7), [K], seed=1), np.eye(K))
