"""Ranking the corpus for written queries: a teacher, fused with BM25, says what is relevant.

The top ranks are positives, ranks further down hard negatives; the ranks between are neither, since
they may well be relevant (arXiv 2502.18460, section 3.2).
Shapes: N passages, Q queries, K components, D ranks.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from drama_dist.augment.written import WrittenQuery
from drama_dist.corpus.collection import PassageTable
from drama_dist.records import Example
from drama_dist.search.dense import DenseIndex
from drama_dist.search.fusion import reciprocal_rank_fusion
from drama_dist.search.lexical import LexicalIndex
from drama_dist.search.shards import TextEncoder
from drama_dist.settings import AugmentSettings


class Ranker:
    """The teacher's index, and BM25's where `lexical` is given."""

    def __init__(self, teacher: TextEncoder, embeddings_NK: np.ndarray, lexical: LexicalIndex | None, rrf_k: int):
        self._teacher, self._lexical, self._rrf_k = teacher, lexical, rrf_k
        self._index = DenseIndex(embeddings_NK)

    def rank(self, queries: Sequence[str], depth: int) -> np.ndarray:
        """Positions of passages, best first, Q × D; -1 where a query has fewer."""
        _, dense_QD = self._index.search(self._teacher.encode_queries(queries), depth)
        if self._lexical is None:
            return dense_QD
        _, words_QD = self._lexical.search(queries, depth)
        return reciprocal_rank_fusion([dense_QD, words_QD], depth, self._rrf_k)[1]


def example(
    written: WrittenQuery, ranking_D: np.ndarray, table: PassageTable, choice: AugmentSettings, seed: int
) -> Example:
    """The training example of a written query, given its ranking.

    Negatives are drawn by the seed from the ranks `negatives_from_rank` to `negatives_to_rank`; the
    passage that the query was written from is never one.
    """
    ids = [table.ids[position] for position in ranking_D if position >= 0]
    positives = ids[: choice.positives]
    far = ids[choice.negatives_from_rank - 1 : choice.negatives_to_rank]
    pool = [id for id in far if id != written.passage_id and id not in positives]
    rng = random.Random(f"{seed} negatives {written.query}")
    negatives = rng.sample(pool, min(choice.negatives, len(pool)))
    return Example(
        written.query, tuple(positives), tuple(negatives), written.source, written.language, written.provenance
    )
