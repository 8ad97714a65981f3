"""Fusion: one ranking out of several, by ranks or by scores.

Reciprocal rank fusion (Cormack, Clarke and Büttcher, SIGIR 2009) and the convex mix of scores that are normalised query
by query (Bruch, Gai and Ingber 2023, arXiv 2210.11934, section 3).
Shapes: Q queries, k hits of a ranking (each may have its own k), M hits of all rankings, D depth.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def reciprocal_rank_fusion(
    rankings: Sequence[np.ndarray], depth: int, rrf_k: int = 60
) -> tuple[np.ndarray, np.ndarray]:
    """Fuse rankings: a passage's score is the sum of 1 / (rrf_k + rank) over those that have it, rank from 1.

    rankings: int64 (Q, k) positions, best first, -1 where there is no hit. Returns scores (Q, D) float64
    and positions (Q, D) int64 with D = depth, best first, ties by position; where a query has fewer
    passages, the rest has position -1 and score 0. Raises ValueError where there is no ranking, the
    rankings have different numbers of queries, or one names a passage twice for a query.
    """
    _check(rankings)
    weights_M = np.concatenate([1.0 / (rrf_k + np.arange(1, ranking.shape[1] + 1)) for ranking in rankings])
    return _best_sums(rankings, np.broadcast_to(weights_M, (len(rankings[0]), len(weights_M))), depth)


def convex_mix(
    rankings: Sequence[tuple[np.ndarray, np.ndarray, float | None]], weights: Sequence[float], depth: int
) -> tuple[np.ndarray, np.ndarray]:
    """Fuse rankings: a passage's score is the sum of weight · normalised score over those that have it.

    rankings: scores (Q, k), positions (Q, k) with -1 where a query has fewer hits, and the score of what is then no
    hit, None where that is not known. A query's scores are normalised to 1 for the best hit and 0 for the least, or
    for what is no hit; a passage that a ranking lacks gets 0 of it, so ask for more hits than are wanted of the mix.
    Returns and raises as `reciprocal_rank_fusion` does.
    """
    _check([positions for _, positions, _ in rankings])
    shares = [weight * _normalised(*ranking) for weight, ranking in zip(weights, rankings, strict=True)]
    return _best_sums([positions for _, positions, _ in rankings], np.concatenate(shares, axis=1), depth)


def _normalised(scores_Qk: np.ndarray, positions_Qk: np.ndarray, missed: float | None) -> np.ndarray:
    if not scores_Qk.size:
        return np.zeros(scores_Qk.shape)
    hits_Qk, scores_Qk = positions_Qk >= 0, scores_Qk.astype(np.float64)
    last_Q1 = np.where(hits_Qk, scores_Qk, np.inf if missed is None else missed).min(1, keepdims=True)
    spread_Q1 = np.where(hits_Qk, scores_Qk, -np.inf).max(1, keepdims=True) - last_Q1  # minus infinity without a hit
    shares_Qk = np.divide(scores_Qk - last_Q1, spread_Q1, out=np.ones_like(scores_Qk), where=spread_Q1 > 0)
    return np.where(hits_Qk, shares_Qk, 0.0)


def _check(rankings: Sequence[np.ndarray]) -> None:
    if not rankings or len({len(ranking) for ranking in rankings}) != 1:
        counts = [len(ranking) for ranking in rankings]
        raise ValueError(f"cannot fuse rankings of {counts} queries: expected equal numbers, at least one ranking")
    for ranking in rankings:
        _refuse_repeats(ranking)


def _best_sums(rankings: Sequence[np.ndarray], weights_QM: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """The `depth` passages with the highest sums of the weights of their hits; see `reciprocal_rank_fusion`."""
    positions_QM = np.concatenate(rankings, axis=1).astype(np.int64, copy=False)
    order_QM = np.argsort(positions_QM, axis=1, kind="stable")
    positions_QM = np.take_along_axis(positions_QM, order_QM, 1)
    weights_QM = np.take_along_axis(weights_QM, order_QM, 1)
    begins_QM = np.ones(positions_QM.shape, dtype=bool)
    begins_QM[:, 1:] = positions_QM[:, 1:] != positions_QM[:, :-1]
    scores_QM = np.full(positions_QM.shape, -np.inf)
    # Rounded, so that the same ranks in another order of rankings are a tie.
    scores_QM[begins_QM] = np.add.reduceat(weights_QM.ravel(), np.flatnonzero(begins_QM)).round(12)
    scores_QM[positions_QM < 0] = -np.inf
    best_QD = np.argsort(-scores_QM, axis=1, kind="stable")[:, :depth]
    scores_QD = np.take_along_axis(scores_QM, best_QD, 1)
    positions_QD = np.where(np.isfinite(scores_QD), np.take_along_axis(positions_QM, best_QD, 1), -1)
    scores_QD = np.where(np.isfinite(scores_QD), scores_QD, 0.0)
    rest = ((0, 0), (0, max(0, depth - scores_QD.shape[1])))
    return np.pad(scores_QD, rest), np.pad(positions_QD, rest, constant_values=-1)


def _refuse_repeats(ranking_Qk: np.ndarray) -> None:
    ordered = np.sort(ranking_Qk, axis=1)
    repeated = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if repeated.any():
        row, column = (int(axis[0]) for axis in np.nonzero(repeated))
        raise ValueError(f"a ranking names passage {ordered[row, column]} twice for query {row}")
