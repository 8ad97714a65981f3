"""The teacher's targets of training: its vectors of the examples' queries, RUN/targets, and the scores of a batch.

The passages' vectors and BM25's index are encodings of the training texts. How raw scores
become logits is in teacher_scale.py, the loss in soft_target_term.py.
Shapes: B queries and N passages of a batch, T components of the teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from drama_dist.corpus.collection import PassageTable
from drama_dist.distributed import ranks
from drama_dist.encoder.sources import model_fingerprint
from drama_dist.kernels import SparseLogits, TeacherScores
from drama_dist.records import Example, Passage, read_records
from drama_dist.run.folder import StageFolder
from drama_dist.run.graph import TRAINING_TEXTS
from drama_dist.run.progress import Progress
from drama_dist.run.runner import Run
from drama_dist.search.lexical import LexicalIndex
from drama_dist.search.shards import EmbeddingShards, TextEncoder, texts_cut, write_shards
from drama_dist.search.systems import SYSTEMS, DenseSystem
from drama_dist.settings import Settings
from drama_dist.train.batches import TextBatch
from drama_dist.train.teacher_scale import passage_moments, scaled_teacher


def sections(settings: Settings) -> dict[str, Any]:
    """The settings that the vectors depend on."""
    return SYSTEMS["teacher"].sections(settings)


def inputs(run: Run) -> dict[str, str]:
    """The teacher's fingerprint."""
    return {"model": run.once(model_fingerprint, run.settings.teacher.model)}


def encode_queries(run: Run, folder: StageFolder) -> None:
    """Encode the queries of all examples, in their order: RUN/targets, embedding shards."""
    teacher, settings = SYSTEMS["teacher"], run.settings
    assert isinstance(teacher, DenseSystem)
    examples = read_records(run.path("augment") / "examples.jsonl", Example.from_json)
    queries = PassageTable.in_memory(Passage(str(n), example.query) for n, example in enumerate(examples))
    encoder, rows = _QueriesAsPassages(teacher.load(settings)), settings.encode.shard_passages
    shards = write_shards(folder.folder, queries, encoder, rows, folder.share, folder.name)
    if shards is not None:
        cut = {"queries": texts_cut(folder.folder)}
        folder.finish(passages=len(shards), dim=shards.dim, dtype=teacher.dtype(settings), cut=cut)


def open_targets(run: Run) -> Targets:
    """What the run's artefacts hold."""
    train = run.settings.train
    lexical = LexicalIndex(run.path(f"encode/{TRAINING_TEXTS}/bm25")) if train.teacher_share < 1 else None
    passages = EmbeddingShards(run.path(f"encode/{TRAINING_TEXTS}/teacher"))
    return Targets(
        EmbeddingShards(run.path("targets")), passages, lexical, train.teacher_share, train.teacher_temperature
    )


@dataclass(frozen=True)
class Targets:
    """The teacher's vectors of all queries and passages, and BM25's index of the passages; None without BM25.

    share: of the teacher in the mix. temperature: of the mix, in standard deviations of a query's scores.
    """

    queries: EmbeddingShards
    passages: EmbeddingShards
    lexical: LexicalIndex | None
    share: float
    temperature: float

    def of(self, batch: TextBatch) -> TeacherScores:
        """The scores of this rank's part of a global batch, on the CPU; every rank must ask for it."""
        rows, columns = ranks.rank_slice(len(batch.queries)), ranks.rank_slice(len(batch.passages))
        queries_BT = torch.from_numpy(self.queries.rows([batch.examples[row] for row in rows]))
        passages_NT = torch.from_numpy(self.passages.rows([batch.positions[column] for column in columns]))
        moments, weights = passage_moments(passages_NT).over_ranks(), (self.share, 1 - self.share)
        sparse = self._sparse([batch.queries[row] for row in rows], batch.positions)
        return scaled_teacher(queries_BT, passages_NT, sparse, weights, self.temperature, moments)

    def _sparse(self, queries: Sequence[str], positions: Sequence[int]) -> SparseLogits | None:
        if self.lexical is None:
            return None
        scores = self.lexical.sparse_scores(queries, positions)
        parts = scores.indptr.astype(np.int64), scores.indices, scores.data.astype(np.float32)
        return SparseLogits(*map(torch.from_numpy, parts))


class _QueriesAsPassages:
    """An encoder whose passages are encoded as queries, because shards are written of passages."""

    def __init__(self, encoder: TextEncoder):
        self._encoder = encoder

    def encode_queries(self, texts: Sequence[str], dim: int | None = None) -> np.ndarray:
        return self._encoder.encode_queries(texts, dim)

    def encode_passages(
        self, texts: Sequence[str], dim: int | None = None, progress: Progress | None = None
    ) -> np.ndarray:
        vectors = self._encoder.encode_queries(texts, dim)
        if progress is not None:
            progress(len(texts))
        return vectors
