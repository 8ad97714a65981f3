"""Tiles in eager PyTorch operations: in float64, and where there is neither a C++ compiler nor Triton.

Any device. Computes in float32 at least, whatever the inputs' precision.
Shapes: B queries, N passages, K components, M dims, R rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from drama_dist.kernels.info_nce.problem import Problem
from drama_dist.kernels.info_nce.tiles import MASKED, Chunking, ChunkScores, add_norm_terms, inverse_norms


class EagerTiles:
    """See Tiles."""

    chunking: ClassVar[Chunking] = Chunking(score_bytes=1 << 26, most_rows=512, row_step=1)

    @classmethod
    def held_bytes(cls, rows: int, columns: int, dims: Sequence[int], threads: int) -> int:
        """See Backend; any threads."""
        chunk = cls.chunking.largest(rows, columns, len(dims))
        scores = (len(dims) + 3) * chunk * columns  # all dims' and three on the way to one dim's
        return 4 * (scores + (rows + columns) * (max(dims) + 3 * len(dims))) + 2 * chunk * columns

    def __init__(self, queries_BK: torch.Tensor, passages_NK: torch.Tensor, temperature: float, problem: Problem):
        precision = torch.promote_types(queries_BK.dtype, torch.float32)
        self._queries, self._passages = queries_BK.to(precision), passages_NK.to(precision)
        self._problem = problem
        self._query_norms_MB = inverse_norms(self._queries, problem.dims)
        self._scaled_norms_MB = self._query_norms_MB / temperature
        self._passage_norms_MN = inverse_norms(self._passages, problem.dims)
        self._products = torch.zeros_like(self._queries), torch.zeros_like(self._passages)
        self._row_terms_MB = torch.zeros_like(self._query_norms_MB)
        self._column_terms_MN = torch.zeros_like(self._passage_norms_MN)
        self._rows = slice(0)
        self._scores_MRN: list[torch.Tensor] = []
        self._positive_MR = self._row_terms_MB

    def scores(self, rows: slice) -> ChunkScores:
        masked_RN = self._problem.masked(rows)
        self._rows, self._scores_MRN = rows, []
        here, columns = self._problem.positives_here(rows)
        positive_MR = self._queries.new_zeros(len(self._problem.dims), rows.stop - rows.start)
        previous = 0
        product_RN = self._queries.new_zeros(positive_MR.shape[1], len(self._passages))
        for index, dim in enumerate(self._problem.dims):
            block = slice(previous, dim)
            product_RN = torch.addmm(product_RN, self._queries[rows, block], self._passages[:, block].T)
            scores_RN = product_RN * self._scaled_norms_MB[index, rows, None] * self._passage_norms_MN[index]
            positive_MR[index, here] = scores_RN[here, columns]
            scores_RN[here, columns] = MASKED
            self._scores_MRN.append(scores_RN if masked_RN is None else scores_RN.masked_fill_(masked_RN, MASKED))
            previous = dim
        self._positive_MR = positive_MR
        negatives_MR = torch.stack([scores_RN.logsumexp(1) for scores_RN in self._scores_MRN])
        masked_pairs = columns.new_zeros(()) if masked_RN is None else masked_RN.sum()
        return ChunkScores(positive_MR, negatives_MR, self._scores_MRN[-1].amax(1), masked_pairs)

    def add_gradients(self, shift_MR: torch.Tensor, missed_MR: torch.Tensor) -> None:
        dims, count = self._problem.dims, len(self._queries)
        here, columns = self._problem.positives_here(self._rows)
        suffix_RN = torch.zeros_like(self._scores_MRN[0])
        for index in reversed(range(len(dims))):
            scores_RN = self._scores_MRN[index]
            gradient_RN = (scores_RN - shift_MR[index, :, None]).exp_()
            gradient_RN[here, columns] = -missed_MR[index, here]
            gradient_RN.mul_(self._problem.weights[index] / count)
            scores_RN[here, columns] = self._positive_MR[index, here]
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
