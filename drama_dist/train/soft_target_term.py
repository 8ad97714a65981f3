"""Soft targets as a term of the objective: the only place where that loss is called, shared over ranks.

How ranks share it is in partition.py, the loss itself in kernels/, and how raw scores of teachers become logits in
teacher_scale.py.
Shapes: M dims, R rows of a chunk, T components of the teacher; the others as in term.py.
"""

from __future__ import annotations

from functools import cached_property, partial

import torch

from drama_dist.distributed import ranks
from drama_dist.kernels import ColumnPart, SparseLogits, TeacherScores, soft_targets
from drama_dist.settings import EncoderSettings, TrainSettings
from drama_dist.train.partition import Share, agreed_backend, prefers_queries, share_of
from drama_dist.train.term import EmbeddedBatch, TermResult

_KIND = "teacher"  # of traffic


class SoftTargetTerm:
    """All ranks' queries' distributions over all ranks' passages against the teacher's, for every dim. See Term.

    Every rank's batch has a teacher, and sparse logits or none on all ranks.
    Figures: soft_per_dim, the mean divergence of each dim; teacher_entropy, the targets' mean entropy.
    """

    def __init__(self, encoder: EncoderSettings, train: TrainSettings, rounded: bool = False):
        """rounded: see `info_nce`."""
        self.encoder, self.train = encoder, train
        self._soft_targets = partial(
            soft_targets,
            temperature=train.soft_target_temperature,
            dims=encoder.dims,
            dim_weights=train.dim_weights or None,
            rounded=rounded,
        )

    def __call__(self, batch: EmbeddedBatch) -> TermResult:
        """Raises ValueError where the batch has no teacher, or the teacher's scores do not fit."""
        if batch.teacher is None:
            raise ValueError("soft targets: the batch has no teacher's scores")
        gather_queries = ranks.world_size() > 1 and self._gathers_queries(batch, batch.teacher)
        share = share_of(batch.queries_BK, batch.passages_NK, gather_queries)
        teacher = _teacher_of(share, batch.teacher)
        if share.most_columns is None:
            result = self._soft_targets(share.queries_BK, share.passages_NK, teacher)
        else:
            part = ColumnPart(None, share.most_columns, _merge)
            backend = self._agreed_backend
            result = self._soft_targets(share.queries_BK, share.passages_NK, teacher, part=part, backend=backend)
        query_gradient_BK, passage_gradient_NK = share.gradients(result.loss)
        figures = torch.cat([torch.stack([result.loss.detach(), result.entropy]), result.per_dim])
        loss, entropy, *per_dim = share.mean(figures)
        named = {"soft_per_dim": dict(zip(self.encoder.dims, per_dim, strict=True)), "teacher_entropy": entropy}
        return TermResult(loss, query_gradient_BK, passage_gradient_NK, named)

    @cached_property
    def _agreed_backend(self) -> str:
        return agreed_backend()

    def _gathers_queries(self, batch: EmbeddedBatch, teacher: TeacherScores) -> bool:
        """By floats: embeddings go and their gradients come, teachers' vectors go, and rows are merged twice."""
        components = 2 * batch.queries_BK.shape[1] + teacher.queries_BT.shape[1]
        merged = 2 * (3 * len(self.encoder.dims) + 3)
        entries = 0
        if teacher.sparse is not None:
            entries = sum(ranks.on_every_rank(len(teacher.sparse.values)))
        queries, passages = len(batch.relevance.positives_B), len(batch.relevance.passage_ids_N)
        return prefers_queries(queries * (components + merged) + 2 * entries, passages * components, self.train)


def _teacher_of(share: Share, teacher: TeacherScores) -> TeacherScores:
    """The scores of a share's rows and columns."""
    if share.most_columns is None:
        passages_NT = ranks.gather_rows(teacher.passages_NT, _KIND)
        return TeacherScores(teacher.queries_BT, passages_NT, teacher.sparse)
    sparse = None if teacher.sparse is None else _gathered(teacher.sparse).of_columns(share.columns)
    return TeacherScores(ranks.gather_rows(teacher.queries_BT, _KIND), teacher.passages_NT, sparse)


def _gathered(sparse: SparseLogits) -> SparseLogits:
    """All ranks' rows."""
    counts = ranks.gather_rows(sparse.starts.diff(), _KIND)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    columns = ranks.gather_rows(sparse.columns.to(torch.int32), _KIND)
    return SparseLogits(starts, columns, ranks.gather_rows(sparse.values, _KIND))


def _merge(
    student_MR: torch.Tensor, teacher_R: torch.Tensor, expected_MR: torch.Tensor, entropy_R: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """See ColumnPart and TeacherRows.merged."""
    dims, kind = len(student_MR), "merged rows"
    own = torch.cat([student_MR, teacher_R.unsqueeze(0)])
    most = ranks.largest_over_ranks(own, kind)
    shares = (own - most).exp()
    share_R = shares[-1]
    entropies_R = share_R * (entropy_R + most[-1] - teacher_R)
    sums = ranks.sum_over_ranks(torch.cat([shares, share_R * expected_MR, entropies_R.unsqueeze(0)]), kind)
    whole, share_R = most + sums[: dims + 1].log(), sums[dims]
    return whole[:dims], whole[dims], sums[dims + 1 : -1] / share_R, sums[-1] / share_R + share_R.log()
