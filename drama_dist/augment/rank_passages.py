"""Ranking the corpus for written queries: a teacher, fused with BM25, says what is relevant.

The top ranks are positives, ranks further down hard negatives; the ranks between are neither, since
they may well be relevant (arXiv 2502.18460, section 3.2).
Shapes: Q queries, D ranks, T components of the teacher.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from drama_dist.augment.written import WrittenQuery
from drama_dist.corpus.collection import PassageTable
from drama_dist.records import Example
from drama_dist.search.dense import search_exact
from drama_dist.search.fusion import reciprocal_rank_fusion
from drama_dist.search.lexical import LexicalIndex
from drama_dist.search.shards import EmbeddingShards, TextEncoder, check_vectors
from drama_dist.settings import AugmentSettings

Score = Callable[[Sequence[int]], Sequence[float]]  # of passages at these positions


class Ranker:
    """Ranks by the teacher's vectors, fused with BM25 where `lexical` is given."""

    def __init__(self, teacher: TextEncoder, shards: EmbeddingShards, lexical: LexicalIndex | None, rrf_k: int):
        self._teacher, self._shards, self._lexical, self._rrf_k = teacher, shards, lexical, rrf_k

    def encode(self, queries: Sequence[str]) -> np.ndarray:
        """The teacher's vectors, Q × T float32; raises ValueError where one is not finite or not of length 1."""
        vectors_QT = self._teacher.encode_queries(queries)
        check_vectors(vectors_QT, queries, lambda row: "a query of training")
        return vectors_QT

    def rank(self, queries: Sequence[str], vectors_QT: np.ndarray, depth: int) -> np.ndarray:
        """Positions of passages, best first, Q × D; -1 where a query has fewer. vectors_QT: what `encode` returns."""
        _, dense_QD = search_exact(self._shards, vectors_QT, depth)
        if self._lexical is None:
            return dense_QD
        _, lexical_QD = self._lexical.search(queries, depth)
        return reciprocal_rank_fusion([dense_QD, lexical_QD], depth, self._rrf_k)[1]

    def scores(self, vector_T: np.ndarray, positions: Sequence[int]) -> list[float]:
        """The teacher's scores of passages for one query. vector_T: of what `encode` returns."""
        scores: list[float] = (self._shards.rows(positions) @ vector_T).tolist()
        return scores


def example(
    written: WrittenQuery,
    ranking_D: np.ndarray,
    table: PassageTable,
    settings: AugmentSettings,
    seed: int,
    score: Score | None = None,
) -> Example:
    """The training example of a written query, given its ranking.

    Positives are the first ranks, or the first of the judged passages; the other judged ones are relevant. Negatives
    are first those that are known to be irrelevant; others are drawn by the seed from the ranks `negatives_from_rank`
    to `negatives_to_rank`. Neither a relevant passage nor the one that the query was written from is among them. Where
    all that is ranked is known to be irrelevant, the first ranks are positives after all. Its provenance has the rank
    of the passage that the query was written from, None beyond `negatives_to_rank`. score: the teacher's of
    passages for this query, which `negative_strata` and `max_negative_score` need.
    """
    ids = [table.ids[position] for position in ranking_D if position >= 0]
    judged, irrelevant = dict.fromkeys(written.judged), set(written.irrelevant)
    found = list(dict.fromkeys(id for id in ids if id in judged) | judged) if judged else []
    found = found or [id for id in ids if id not in irrelevant] or ids
    positives, relevant = found[: settings.positives], found[settings.positives :] if judged else []
    far = ids[settings.negatives_from_rank - 1 : settings.negatives_to_rank]
    barred = {written.passage_id, *positives, *relevant, *irrelevant}
    pool = [id for id in far if id not in barred]
    if score is not None:
        of_positives, of_pool = (score([table.position(id) for id in some]) for some in (positives, pool))
        bound = _bound(of_positives, settings.max_negative_score)
        pool = [id for scored, id in _best_first(of_pool, pool) if scored <= bound]
    provenance = written.provenance
    if written.passage_id:
        rank = ids.index(written.passage_id) + 1 if written.passage_id in ids else None
        provenance = {**provenance, "rank": rank}
    rng = random.Random(f"{seed} negatives {written.query}")
    known = [id for id in written.irrelevant if id not in (*positives, *relevant)]
    known = rng.sample(known, min(settings.negatives, len(known)))
    negatives = known + _drawn(pool, settings.negatives - len(known), settings.negative_strata, rng)
    return Example(
        written.query,
        tuple(positives),
        tuple(negatives),
        written.source,
        written.language,
        provenance,
        tuple(relevant),
    )


def comes_back(example: Example, first: int) -> bool:
    """The round trip (Dai et al. 2023, arXiv 2209.11755): whether the passage that a query was written from is among
    the `first` that are ranked for it. True of queries that were written from none.
    """
    rank = example.provenance.get("rank", 1)
    return rank is not None and rank <= first


def _bound(of_positives: Sequence[float], share: float | None) -> float:
    """The score above which a passage is likely to be relevant, too (Moreira et al. 2024, arXiv 2407.15831).

    A share of a score below 0 is no bound.
    """
    lowest = min(of_positives, default=0.0)
    return float("inf") if share is None or lowest <= 0 else share * lowest


def _best_first(scores: Sequence[float], ids: Sequence[str]) -> list[tuple[float, str]]:
    return sorted(zip(scores, ids, strict=True), key=lambda pair: -pair[0])


def _drawn(pool: Sequence[str], count: int, strata: int, rng: random.Random) -> list[str]:
    """At most `count` of the pool: as many, or one more, of each of `strata` equal parts, as far as they have them."""
    ends = [len(pool) * part // strata for part in range(strata + 1)]
    parts = [pool[begin:end] for begin, end in pairwise(ends)]
    counts = [count // strata + (part < count % strata) for part in range(strata)]
    drawn = [id for part, wanted in zip(parts, counts, strict=True) for id in rng.sample(part, min(wanted, len(part)))]
    taken = set(drawn)
    left = [id for id in pool if id not in taken]
    return drawn + rng.sample(left, min(count - len(drawn), len(left)))
