"""The teacher's targets of training: its scores of a batch, and BM25's.

The queries' vectors are those that ranking the examples took, RUN/augment/query_vectors; the passages' vectors and
BM25's index are encodings of the training texts. How raw scores become logits is in teacher_scale.py, the loss in
soft_target_term.py.
Shapes: B queries and N passages of a batch, T components of the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from drama_dist.distributed import ranks
from drama_dist.kernels import SparseLogits, TeacherScores
from drama_dist.run.graph import TRAINING_TEXTS
from drama_dist.run.runner import Run
from drama_dist.search.lexical import LexicalIndex
from drama_dist.search.shards import QUERY_VECTORS, EmbeddingShards
from drama_dist.train.batches import TextBatch
from drama_dist.train.target_vectors import VectorTargets
from drama_dist.train.teacher_scale import passage_moments, scaled_teacher


def open_targets(run: Run) -> Targets:
    """What the run's artefacts hold."""
    targets, train = run.settings.targets, run.settings.train
    lexical = LexicalIndex(run.path(f"encode/{TRAINING_TEXTS}/bm25")) if targets.uses_bm25 else None
    queries = EmbeddingShards(run.path("augment") / QUERY_VECTORS)
    passages = EmbeddingShards(run.path(f"encode/{TRAINING_TEXTS}/teacher"))
    return Targets(VectorTargets(queries, passages), lexical, targets.teacher_share, train.teacher_temperature)


@dataclass(frozen=True)
class Targets:
    """The teacher's vectors of all queries and passages, and BM25's index of the passages; None without BM25.

    share: of the teacher in the mix. temperature: of the mix, in standard deviations of a query's scores.
    """

    vectors: VectorTargets
    lexical: LexicalIndex | None
    share: float
    temperature: float

    def of(self, batch: TextBatch) -> TeacherScores:
        """The scores of this rank's part of a global batch, on the CPU; every rank must ask for it."""
        own, weights = self.vectors.of(batch), (self.share, 1 - self.share)
        moments = passage_moments(own.passages_NK).over_ranks()
        sparse = self._sparse([batch.queries[row] for row in ranks.rank_slice(len(batch.queries))], batch.positions)
        return scaled_teacher(own.queries_BK, own.passages_NK, sparse, weights, self.temperature, moments)

    def _sparse(self, queries: Sequence[str], positions: Sequence[int]) -> SparseLogits | None:
        if self.lexical is None:
            return None
        scores = self.lexical.sparse_scores(queries, positions)
        parts = scores.indptr.astype(np.int64), scores.indices, scores.data.astype(np.float32)
        return SparseLogits(*map(torch.from_numpy, parts))
