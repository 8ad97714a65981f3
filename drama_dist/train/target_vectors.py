"""The targets stage: RUN/targets, what the encoder's vectors of training queries and passages are to become.

Fits the target space (target_fit.py) and writes the targets as embedding shards: queries/ in the order of the examples,
passages/ in the order of the training passages.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix

from drama_dist.distributed import ranks
from drama_dist.records import Example, read_records
from drama_dist.run.folder import StageFolder
from drama_dist.run.graph import TRAINING_TEXTS
from drama_dist.run.progress import progress_bar
from drama_dist.run.runner import Run
from drama_dist.search.lexical import LexicalIndex
from drama_dist.search.shards import QUERY_VECTORS, EmbeddingShards, write_shard
from drama_dist.search.target_space import TargetSpace
from drama_dist.search.teacher import Kind
from drama_dist.setting_types import recorded
from drama_dist.settings import Settings
from drama_dist.train.batches import TextBatch
from drama_dist.train.target_fit import COMMON, FITTED, Texts, fit_target_space
from drama_dist.train.term import TargetVectors
from drama_dist.train.token_vectors import PASSAGE_WEIGHT

_FOLDERS: dict[Kind, str] = {"query": "queries", "passage": "passages"}


def sections(settings: Settings) -> dict[str, Any]:
    """The settings that the targets depend on."""
    of_shards = {"dims": list(settings.encoder.dims), "shard_passages": settings.encode.shard_passages}
    fit = {"means_above": COMMON}  # without it are targets of earlier versions, whose shares were of dot products
    return {"seed": settings.seed, "targets": {**recorded(settings.targets), **of_shards, **fit}}


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
        return cls(*(EmbeddingShards(folder / name) for name in _FOLDERS.values()))

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

    queries, passages = Texts(of_queries, words_of_queries), Texts(of_passages, words_of_passages)
    space = fit_target_space(settings, weights_NV, queries, passages)
    space.save(folder)
    _write_kind(settings, folder, space, "query", queries)
    _write_kind(settings, folder, space, "passage", passages)


def _write_kind(settings: Settings, folder: Path, space: TargetSpace, kind: Kind, texts: Texts) -> None:
    vectors, name = texts.vectors, _FOLDERS[kind]
    (folder / name).mkdir(exist_ok=True)
    bar = progress_bar(len(vectors), f"targets: {name}", "texts")
    for shard, (first, teacher_nT) in enumerate(vectors.blocks(settings.encode.shard_passages)):
        rows = np.arange(first, first + len(teacher_nT))
        words_nV = texts.words(rows) if texts.words else None
        write_shard(folder / name, shard, space.targets(kind, teacher_nT, words_nV))
        bar.update(len(rows))
    bar.close()
