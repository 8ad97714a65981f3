"""A program for several ranks: the soft targets' term, once for every name; rank 0 writes what came of each.

torchrun tests/train/soft_target_ranks.py - OUT NAME ...; NAME is partition-kind, for example queries-both. Each rank
has its own texts' embeddings and raw scores. Started by test_soft_targets.py, which says what must come out.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

from drama_dist.distributed import ranks
from drama_dist.kernels import SparseLogits
from drama_dist.kernels.info_nce.cpu import CPUTiles
from drama_dist.kernels.info_nce.tiles import Chunking
from drama_dist.settings import EncoderSettings, TrainSettings
from drama_dist.train.soft_target_term import SoftTargetTerm
from drama_dist.train.teacher_scale import passage_moments, scaled_teacher
from drama_dist.train.term import EmbeddedBatch, Relevance

QUERIES, PASSAGES, K, T = 11, 23, 24, 9
DIMS, DIM_WEIGHTS = [24, 7], [0.7, 0.3]
MIX, TEACHER_TEMPERATURE, TEMPERATURE = (0.6, 0.4), 0.5, 0.1
KINDS = ("dense", "both")


def inputs() -> tuple[torch.Tensor, ...]:
    """Of the global batch: embeddings; a teacher's vectors, of length 1; and BM25's scores as a matrix."""
    generator = torch.Generator().manual_seed(4)
    queries, passages = (torch.randn(count, K, generator=generator) for count in (QUERIES, PASSAGES))
    vectors = (torch.randn(count, T, generator=generator) + 0.5 for count in (QUERIES, PASSAGES))
    scores = 20 * torch.rand(QUERIES, PASSAGES, generator=generator)
    kept = torch.rand(QUERIES, PASSAGES, generator=generator) < 0.3
    kept[2], kept[5] = False, True  # a query without a score, and one with all
    return queries, passages, *(torch.nn.functional.normalize(side) for side in vectors), scores * kept


def sparse_of(dense: torch.Tensor) -> SparseLogits:
    """What is not 0 of a matrix."""
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), dense.count_nonzero(1).cumsum(0)])
    return SparseLogits(starts, dense.nonzero()[:, 1], dense[dense != 0])


def batch_of_this_rank(kind: str) -> EmbeddedBatch:
    """Its rows of everything."""
    queries, passages, teacher_queries, teacher_passages, scores = inputs()
    rows, columns = (slice(each.start, each.stop) for each in map(ranks.rank_slice, (QUERIES, PASSAGES)))
    moments = passage_moments(teacher_passages[columns]).over_ranks()
    sparse = sparse_of(scores[rows]) if kind == "both" else None
    vectors = teacher_queries[rows], teacher_passages[columns]
    teacher = scaled_teacher(*vectors, sparse, MIX, TEACHER_TEMPERATURE, moments)
    relevance = Relevance(torch.arange(QUERIES), torch.arange(PASSAGES))
    return EmbeddedBatch(queries[rows], passages[columns], relevance, teacher)


def run(name: str) -> dict[str, object]:
    """Loss, figures, all ranks' gradients, and the bytes that rank 0 sent for them."""
    partition, kind = name.split("-")
    settings = TrainSettings(loss_partition=partition, dim_weights=DIM_WEIGHTS, soft_target_temperature=TEMPERATURE)  # type: ignore[arg-type]
    batch = batch_of_this_rank(kind)
    ranks.take_traffic()
    result = SoftTargetTerm(EncoderSettings(dims=DIMS), settings)(batch)
    sent = ranks.take_traffic()
    gradients = [ranks.gather_rows(each, "test") for each in (result.query_gradient_BK, result.passage_gradient_NK)]
    return {"loss": result.loss, "figures": result.figures, "gradients": gradients, "sent": sent}


def main() -> None:
    _, out, *names = sys.argv[1:]
    torch.set_num_threads(1)
    CPUTiles.chunking = Chunking(1, most_rows=3, row_step=3)  # several, each of which ranks merge
    ranks.start()
    for name in names:
        result = run(name)
        if ranks.rank() == 0:
            torch.save(result, Path(out) / f"{name}.pt")
    ranks.stop()
    ranks.end(0)


if __name__ == "__main__":
    main()
