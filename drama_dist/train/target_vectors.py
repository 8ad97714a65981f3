"""The targets stage: RUN/targets, what the encoder's vectors of training queries and passages are to become.

Fits the target space, which target_space.py defines, and writes the targets as embedding shards: queries/ in the order
of the examples, passages/ in the order of the training passages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix

from drama_dist.distributed import ranks
from drama_dist.encoder.pooling import unit_rows
from drama_dist.records import Example, read_records
from drama_dist.run.folder import StageFolder
from drama_dist.run.graph import TRAINING_TEXTS
from drama_dist.run.progress import progress_bar
from drama_dist.run.runner import Run
from drama_dist.search.lexical import LexicalIndex
from drama_dist.search.shards import QUERY_VECTORS, EmbeddingShards, write_shard
from drama_dist.search.target_space import TargetSpace, joined_parts, principal_axes, word_vectors
from drama_dist.setting_types import recorded
from drama_dist.settings import Settings
from drama_dist.train.batches import TextBatch
from drama_dist.train.nested_axes import nested_turn
from drama_dist.train.term import TargetVectors
from drama_dist.train.token_vectors import PASSAGE_WEIGHT

_KINDS = ("queries", "passages")
FITTED = 50_000  # texts of each kind that the space, and then the closed form, is fitted to

Words = Callable[[np.ndarray], csr_matrix]  # of texts at these positions


def sections(settings: Settings) -> dict[str, Any]:
    """The settings that the targets depend on."""
    of_shards = {"dims": list(settings.encoder.dims), "shard_passages": settings.encode.shard_passages}
    return {"seed": settings.seed, "targets": {**recorded(settings.targets), **of_shards}}


def write_targets(run: Run, folder: StageFolder) -> None:
    """Do the stage, which rank 0 does alone: next to the teacher's encoding it takes little time.

    Raises ValueError where the targets have fewer components than encoder.dims asks for.
    """
    ranks.by_rank_0(lambda: _write(run, folder.folder))
    written = VectorTargets.open(folder.folder)
    folder.finish(queries=len(written.queries), texts=len(written.passages), components=written.queries.dim)


@dataclass(frozen=True)
class VectorTargets:
    """Of the examples' queries, and of the training passages."""

    queries: EmbeddingShards
    passages: EmbeddingShards

    @classmethod
    def open(cls, folder: Path) -> VectorTargets:
        """What the stage has written."""
        return cls(*(EmbeddingShards(folder / name) for name in _KINDS))

    def of(self, batch: TextBatch) -> TargetVectors:
        """Of this rank's part of a global batch, on the CPU."""
        rows, columns = ranks.rank_slice(len(batch.queries)), ranks.rank_slice(len(batch.passages))
        return TargetVectors(
            torch.from_numpy(self.queries.rows([batch.examples[row] for row in rows])),
            torch.from_numpy(self.passages.rows([batch.positions[column] for column in columns])),
            self.passages_weigh,
        )

    @property
    def passages_weigh(self) -> float:
        """The share of the loss that is all passages': what it is in the closed form, which training begins from."""
        queries, passages = (min(len(vectors), FITTED) for vectors in (self.queries, self.passages))
        return PASSAGE_WEIGHT * passages / (queries + PASSAGE_WEIGHT * passages)


def _write(run: Run, folder: Path) -> None:
    settings = run.settings
    examples = read_records(run.path("augment") / "examples.jsonl", Example.from_json)
    of_queries = EmbeddingShards(run.path("augment") / QUERY_VECTORS)
    of_passages = EmbeddingShards(run.path(f"encode/{TRAINING_TEXTS}/teacher"))
    words_of_queries = words_of_passages = None
    weights_NV = None
    if settings.targets.uses_bm25:
        lexical = LexicalIndex(run.path(f"encode/{TRAINING_TEXTS}/bm25"))
        weights_NV = lexical.weights()
        words_of_passages = weights_NV.__getitem__

        def words_of_queries(rows: np.ndarray) -> csr_matrix:
            return lexical.counts([examples[row].query for row in rows])

    kinds = ((of_queries, words_of_queries), (of_passages, words_of_passages))
    space = _fit(settings, weights_NV, kinds)
    space.save(folder)
    for name, (vectors, words) in zip(_KINDS, kinds, strict=True):
        (folder / name).mkdir(exist_ok=True)
        bar = progress_bar(len(vectors), f"targets: {name}", "texts")
        for shard, (rows, teacher_nT) in enumerate(_blocks(vectors, settings.encode.shard_passages)):
            write_shard(folder / name, shard, space.targets(teacher_nT, None if words is None else words(rows)))
            bar.update(len(rows))
        bar.close()


def _fit(
    settings: Settings, weights_NV: csr_matrix | None, kinds: tuple[tuple[EmbeddingShards, Words | None], ...]
) -> TargetSpace:
    share, chance = settings.targets.teacher_share, np.random.default_rng(settings.seed)
    if weights_NV is None:
        words_VL = None
    else:
        some = _drawn(weights_NV.shape[0], chance)
        words_VL = word_vectors(weights_NV[some], settings.targets.lexical_components, settings.seed)
    parts = []
    for vectors, words in kinds:
        rows = _drawn(len(vectors), chance)
        parts.append(joined_parts(share, vectors.rows(rows), None if words is None else words(rows), words_VL))
    moment_JJ = np.sum([part_nJ.T.astype(np.float64) @ part_nJ / len(part_nJ) for part_nJ in parts], axis=0)
    dims, lexical = settings.encoder.dims, 0 if words_VL is None else words_VL.shape[1]
    axes_JK = principal_axes(moment_JJ, max(dims), lexical)
    queries_nK, passages_nK = (unit_rows(part_nJ @ axes_JK) for part_nJ in parts)
    return TargetSpace(share, words_VL, axes_JK @ nested_turn(queries_nK, passages_nK, dims, settings.seed))


def _drawn(count: int, chance: np.random.Generator) -> np.ndarray:
    return np.sort(chance.choice(count, min(count, FITTED), replace=False, shuffle=False))


def _blocks(vectors: EmbeddingShards, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for first, block_nT in vectors.blocks(rows):
        yield np.arange(first, first + len(block_nT)), block_nT
