"""Measures of a ranking against judgements, with trec_eval's arithmetic.

Covers nDCG@10, Recall@100, MRR@10 and a paired significance test. The order of the hits is taken as
given: equal scores are not reordered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pytrec_eval
from scipy.stats import permutation_test

from drama_dist.corpus.collection import Qrels
from drama_dist.records import Hit

METRICS = ("ndcg@10", "recall@100", "mrr@10")
RankedHits = Mapping[str, Sequence[Hit]]
_SIGNS_AT_ONCE = 2_000_000  # about 160 MB; scipy is slow in small batches, and the batch changes no result


def mean_over_queries(values: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Means of METRICS over what `per_query` returns."""
    return {name: float(np.mean([row[name] for row in values.values()])) for name in METRICS}


def per_query(qrels: Qrels, run: RankedHits) -> dict[str, dict[str, float]]:
    """METRICS of every judged query, in the order of `qrels`; a query without hits counts 0.

    qrels: grades, 0 or less for not relevant. run: query id -> hits, best first. Raises ValueError if there is no
    judged query, or a hit is named twice for one query.
    """
    if not qrels:
        raise ValueError("no judged queries: the qrels are empty, so there is nothing to measure")
    # A query whose grades are all -2 or less ends the process in pytrec_eval; no measure tells them from 0.
    judged = {query: {id: max(0, grade) for id, grade in grades.items()} for query, grades in qrels.items()}
    ranked = {query: _by_rank(query, run[query]) for query in judged if run.get(query)}
    first_ten = {query: dict(list(scores.items())[:10]) for query, scores in ranked.items()}
    whole = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.10", "recall.100"}).evaluate(ranked)
    top = pytrec_eval.RelevanceEvaluator(judged, {"recip_rank"}).evaluate(first_ten)
    return {
        query: {
            "ndcg@10": whole.get(query, {}).get("ndcg_cut_10", 0.0),
            "recall@100": whole.get(query, {}).get("recall_100", 0.0),
            "mrr@10": top.get(query, {}).get("recip_rank", 0.0),
        }
        for query in judged
    }


def _by_rank(query: str, hits: Sequence[Hit]) -> dict[str, float]:
    # trec_eval sorts by score and breaks ties by passage id; minus the rank has no ties.
    scores = {hit.passage_id: -float(rank) for rank, hit in enumerate(hits, 1)}
    if len(scores) != len(hits):
        names = [hit.passage_id for hit in hits]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"query {query!r}: passage {twice!r} is among the hits twice")
    return scores


def evenly_weighted(values: Iterable[Sequence[float]]) -> list[float]:
    """Values of queries, for `paired_p_value` of the average over collections: each counts as much as any other.

    values: of each collection's queries.
    """
    return [value / len(each) for each in values for value in each]


def paired_p_value(ours: Sequence[float], theirs: Sequence[float], seed: int, rounds: int = 10_000) -> float:
    """Two-sided p of a paired randomisation test (Fisher), scipy's: could the mean difference be chance?

    ours, theirs: one value per query, same order. Each round flips the sign of each difference with probability one
    half; where there are no more patterns of signs than rounds, p is exact. Raises ValueError where the numbers of
    queries differ or are 0.
    """
    if len(ours) != len(theirs) or not len(ours):
        raise ValueError(f"expected values of the same queries, got {len(ours)} and {len(theirs)}")
    differences = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    differences = differences[differences != 0]  # the others have no sign to flip
    if len(differences) < 2:  # which scipy refuses; a single one is as far from 0 with either sign
        return 1.0
    tested = permutation_test(
        (differences,),
        _distance_from_zero,
        permutation_type="samples",
        vectorized=True,
        n_resamples=rounds,
        batch=max(1, _SIGNS_AT_ONCE // len(differences)),
        alternative="greater",
        rng=seed,
    )
    return float(tested.pvalue)


def _distance_from_zero(differences: np.ndarray, axis: int) -> np.ndarray:
    # Rounded: scipy's tolerance for equal sums is relative, so it is none where a sum is 0 up to float64's error.
    distance: np.ndarray = np.abs(differences.sum(axis=axis)).round(12)
    return distance
