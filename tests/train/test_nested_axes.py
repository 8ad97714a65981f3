"""The learnt turn: whole vectors rank as before, and prefixes more as whole vectors do than with principal axes."""

from __future__ import annotations

import numpy as np

from drama_dist.encoder.pooling import matryoshka_cut_array, unit_rows
from drama_dist.search.target_space import principal_axes
from drama_dist.train.nested_axes import nested_turn

K, PREFIX = 24, 6


def texts(count: int, seed: int, own: float) -> np.ndarray:
    """The first six components are `own` long, the next six say which texts are alike, the rest says almost nothing."""
    lengths = np.repeat([own, 0.3, 0.02], [PREFIX, PREFIX, K - 2 * PREFIX])
    return unit_rows(np.random.default_rng(seed).standard_normal((count, K)) * lengths)


def queries_and_passages(queries: int, passages: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Queries are longest in components in which passages are alike: what is longest says nothing of the order."""
    return texts(queries, seed, own=1.0), texts(passages, seed + 1, own=0.01)


def overlap_of_prefixes(queries: np.ndarray, passages: np.ndarray, turn: np.ndarray) -> float:
    """The share of the ten nearest passages by whole vectors that are among the ten nearest by prefixes."""
    prefixes = [matryoshka_cut_array(each @ turn, PREFIX) for each in (queries, passages)]
    whole = np.argsort(-queries @ passages.T)[:, :10]
    short = np.argsort(-prefixes[0] @ prefixes[1].T)[:, :10]
    return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(whole, short, strict=True)]))


def test_prefixes_rank_more_as_whole_vectors_do() -> None:
    trained, unseen = queries_and_passages(300, 500, 0), queries_and_passages(50, 200, 2)
    axes = principal_axes(np.sum([each.T @ each / len(each) for each in trained], axis=0), K, lexical=0)
    queries, passages = (each @ axes for each in unseen)
    turn = nested_turn(trained[0] @ axes, trained[1] @ axes, [K, PREFIX], seed=1)
    before, after, other_way = (overlap_of_prefixes(queries, passages, each) for each in (np.eye(K), turn, turn.T))
    assert after > before + 0.1
    assert after > other_way + 0.1
    np.testing.assert_allclose(turn.T @ turn, np.eye(K), atol=1e-5)
    np.testing.assert_allclose((queries @ turn) @ (passages @ turn).T, queries @ passages.T, atol=1e-5)


def test_a_seed_gives_the_same_turn_of_fewer_texts_than_a_step_takes() -> None:
    queries, passages = queries_and_passages(7, 11, 4)
    turns = [nested_turn(queries, passages, [K, 12, PREFIX], seed) for seed in (1, 1)]
    np.testing.assert_array_equal(*turns)
    assert not np.allclose(turns[0], np.eye(K), atol=1e-3)


def test_without_shorter_dims_nothing_is_turned() -> None:
    np.testing.assert_array_equal(nested_turn(*queries_and_passages(7, 9, 6), [K], seed=1), np.eye(K))
