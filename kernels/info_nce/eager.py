"""Tiles in eager PyTorch operations: in float64, and where there is neither a C++ compiler nor Triton.

Any device. Computes in float32 at least, whatever the inputs' precision.
Shapes: B queries, N passages, K components, M dims, R rows of a chunk, T components of a teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch

from drama_dist.kernels.info_nce.problem import Contrast, Distillation, Problem
from drama_dist.kernels.info_nce.rows import MASKED, ContrastRows, Rows, TeacherRows
from drama_dist.kernels.info_nce.tiles import Chunking, add_norm_terms, inverse_norms


class EagerTiles:
    """See Tiles."""

    chunking: ClassVar[Chunking] = Chunking(score_bytes=1 << 26, most_rows=512, row_step=1)

    @classmethod
    def held_bytes(cls, rows: int, columns: int, dims: Sequence[int], threads: int, teacher: int | None = None) -> int:
        """See Backend; any threads."""
        planes = len(dims) + (teacher is not None)
        chunk = cls.chunking.largest(rows, columns, planes)
        scores = (planes + 3) * chunk * columns  # all planes, and three on the way to one
        return 4 * (scores + (rows + columns) * (max(dims) + 3 * len(dims))) + 2 * chunk * columns

    def __init__(self, queries_BK: torch.Tensor, passages_NK: torch.Tensor, temperature: float, problem: Problem):
        precision = torch.promote_types(queries_BK.dtype, torch.float32)
        self._queries, self._passages = queries_BK.to(precision), passages_NK.to(precision)
        self._problem, self._loss = problem, _loss_of(problem, precision)
        self._query_norms_MB = inverse_norms(self._queries, problem.dims)
        self._scaled_norms_MB = self._query_norms_MB / temperature
        self._passage_norms_MN = inverse_norms(self._passages, problem.dims)
        self._products = torch.zeros_like(self._queries), torch.zeros_like(self._passages)
        self._row_terms_MB = torch.zeros_like(self._query_norms_MB)
        self._column_terms_MN = torch.zeros_like(self._passage_norms_MN)
        self._rows = slice(0)
        self._scores_MRN: list[torch.Tensor] = []

    def scores(self, rows: slice) -> Rows:
        self._rows, self._scores_MRN = rows, []
        self._loss.begin(rows)
        previous = 0
        product_RN = self._queries.new_zeros(rows.stop - rows.start, len(self._passages))
        for index, dim in enumerate(self._problem.dims):
            block = slice(previous, dim)
            product_RN = torch.addmm(product_RN, self._queries[rows, block], self._passages[:, block].T)
            scores_RN = product_RN * self._scaled_norms_MB[index, rows, None] * self._passage_norms_MN[index]
            self._scores_MRN.append(self._loss.taken_up(index, scores_RN))
            previous = dim
        return self._loss.rows(self._scores_MRN)

    def add_gradients(self, shift_MR: torch.Tensor, other: torch.Tensor) -> None:
        dims, count = self._problem.dims, len(self._queries)
        suffix_RN = torch.zeros_like(self._scores_MRN[0])
        for index in reversed(range(len(dims))):
            scores_RN = self._scores_MRN[index]
            gradient_RN = (scores_RN - shift_MR[index, :, None]).exp_()
            self._loss.complete(index, gradient_RN, scores_RN, other)
            gradient_RN.mul_(self._problem.weights[index] / count)
            scores_RN.mul_(gradient_RN)
            self._row_terms_MB[index, self._rows] = scores_RN.sum(1)
            self._column_terms_MN[index] += scores_RN.sum(0)
            gradient_RN *= self._scaled_norms_MB[index, self._rows, None]
            suffix_RN += gradient_RN.mul_(self._passage_norms_MN[index])
            block = slice(dims[index - 1] if index else 0, dims[index])
            self._products[0][self._rows, block] = suffix_RN @ self._passages[:, block]
            self._products[1][:, block] += suffix_RN.T @ self._queries[self._rows, block]

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        dims = self._problem.dims
        add_norm_terms(self._products[0], self._queries, dims, self._row_terms_MB, self._query_norms_MB)
        add_norm_terms(self._products[1], self._passages, dims, self._column_terms_MN, self._passage_norms_MN)
        return self._products


class _Loss(Protocol):
    """What a loss makes of a chunk's scores, dim after dim."""

    def begin(self, rows: slice) -> None: ...

    def taken_up(self, index: int, scores_RN: torch.Tensor) -> torch.Tensor:
        """A dim's scores, changed in place to what is kept."""
        ...

    def rows(self, scores_MRN: Sequence[torch.Tensor]) -> Rows:
        """After the last dim."""
        ...

    def complete(self, index: int, gradient_RN: torch.Tensor, scores_RN: torch.Tensor, other: torch.Tensor) -> None:
        """In place: exp(S − shift) to B · dL/dS of weight 1, and the kept scores back to what they were."""
        ...


def _loss_of(problem: Problem, precision: torch.dtype) -> _Loss:
    if isinstance(problem, Distillation):
        return _SoftTargets(problem, precision)
    assert isinstance(problem, Contrast)
    return _InfoNCE(problem)


class _InfoNCE:
    def __init__(self, problem: Contrast):
        self._problem = problem
        self._here = self._columns = torch.empty(0, dtype=torch.int64)
        self._masked_RN: torch.Tensor | None = None
        self._positive_MR = torch.empty(0)

    def begin(self, rows: slice) -> None:
        self._here, self._columns = self._problem.positives_here(rows)
        self._masked_RN = self._problem.masked(rows)
        self._positive_MR = torch.empty(0)

    def taken_up(self, index: int, scores_RN: torch.Tensor) -> torch.Tensor:
        if not index:
            self._positive_MR = scores_RN.new_zeros(len(self._problem.dims), len(scores_RN))
        self._positive_MR[index, self._here] = scores_RN[self._here, self._columns]
        scores_RN[self._here, self._columns] = MASKED
        return scores_RN if self._masked_RN is None else scores_RN.masked_fill_(self._masked_RN, MASKED)

    def rows(self, scores_MRN: Sequence[torch.Tensor]) -> ContrastRows:
        negatives_MR = torch.stack([scores_RN.logsumexp(1) for scores_RN in scores_MRN])
        masked_pairs = self._columns.new_zeros(()) if self._masked_RN is None else self._masked_RN.sum()
        self._masked_RN = None
        return ContrastRows(self._positive_MR, negatives_MR, scores_MRN[-1].amax(1), masked_pairs)

    def complete(self, index: int, gradient_RN: torch.Tensor, scores_RN: torch.Tensor, missed_MR: torch.Tensor) -> None:
        gradient_RN[self._here, self._columns] = -missed_MR[index, self._here]
        scores_RN[self._here, self._columns] = self._positive_MR[index, self._here]


class _SoftTargets:
    """Holds a chunk's targets over these columns, and the logsumexp that they were made with."""

    def __init__(self, problem: Distillation, precision: torch.dtype):
        self._teacher, self._precision = problem.teacher, precision
        self._targets_RN = self._teacher_R = self._entropy_R = torch.empty(0)
        self._expected: list[torch.Tensor] = []

    def begin(self, rows: slice) -> None:
        self._expected, self._targets_RN = [], torch.empty(0)
        logits_RN = self._teacher.logits(rows, self._precision)
        most_R = logits_RN.amax(1)
        sum_R = logits_RN.sub_(most_R[:, None]).logsumexp(1)
        self._teacher_R = most_R + sum_R  # of large logits not precise enough for the next line
        log_targets_RN = logits_RN.sub_(sum_R[:, None])
        self._targets_RN = log_targets_RN.exp()
        self._entropy_R = -log_targets_RN.mul_(self._targets_RN).sum(1)

    def taken_up(self, index: int, scores_RN: torch.Tensor) -> torch.Tensor:
        self._expected.append((self._targets_RN * scores_RN).sum(1))
        return scores_RN

    def rows(self, scores_MRN: Sequence[torch.Tensor]) -> TeacherRows:
        student_MR = torch.stack([scores_RN.logsumexp(1) for scores_RN in scores_MRN])
        return TeacherRows(student_MR, self._teacher_R, torch.stack(self._expected), self._entropy_R)

    def complete(self, index: int, gradient_RN: torch.Tensor, scores_RN: torch.Tensor, teacher_R: torch.Tensor) -> None:
        share_R1 = (self._teacher_R - teacher_R).exp().unsqueeze(1)  # of these columns among all parts'
        gradient_RN.addcmul_(self._targets_RN, share_R1, value=-1)
