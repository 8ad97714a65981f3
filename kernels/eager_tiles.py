"""Tiles in eager PyTorch operations: where there is no compiler, and in float64.

Computes in float32 at least, whatever the inputs' precision.
Shapes: B queries, N passages, K components, M dims, R rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from drama_dist.kernels.problem import Problem
from drama_dist.kernels.tiles import MASKED, ChunkScores, Gradients, Norms, row_chunks

_SCORE_BYTES = 1 << 26
_MOST_ROWS = 512


def chunk_rows(rows: int, columns: int, dims: Sequence[int]) -> list[int]:
    """How many rows each chunk has; columns: of the largest part."""
    return [len(range(rows)[part]) for part in row_chunks(rows, columns, len(dims), _SCORE_BYTES, _MOST_ROWS, 1)]


def held_bytes(rows: int, columns: int, dims: Sequence[int], threads: int) -> int:
    """What a call holds at most beside its float32 inputs, masks of one document included; any threads."""
    count = chunk_rows(rows, columns, dims)[0]
    scores = (len(dims) + 3) * count * columns  # suffix, one dim's gradient, and its exponent
    return 4 * (scores + (rows + columns) * (max(dims) + 3 * len(dims))) + 2 * count * columns


class EagerTiles:
    """See Tiles."""

    def __init__(self, queries_BK: torch.Tensor, passages_NK: torch.Tensor, temperature: float, problem: Problem):
        precision = torch.promote_types(queries_BK.dtype, torch.float32)
        self._query, self._passage = queries_BK.to(precision), passages_NK.to(precision)
        self._problem, self._columns = problem, len(passages_NK)
        self._norms = Norms(self._query, self._passage, temperature, problem.dims)
        self._exponent = 1 + problem.hardness * temperature
        self._products = torch.zeros_like(self._query), torch.zeros_like(self._passage)
        self._row_terms_MB = torch.zeros_like(self._norms.query_MB)
        self._column_terms_MN = torch.zeros_like(self._norms.passage_MN)
        self._normalisers_MN = torch.full_like(self._norms.passage_MN, -torch.inf)
        self._rows = slice(0)
        self._scores_MRN: list[torch.Tensor] = []
        self._own_MR = self._row_terms_MB

    def row_chunks(self) -> Iterator[slice]:
        most, dims = self._problem.most_columns(self._columns), len(self._problem.dims)
        return row_chunks(len(self._query), most, dims, _SCORE_BYTES, _MOST_ROWS, 1)

    def scores(self, rows: slice) -> ChunkScores:
        masked_RN = self._problem.masked(rows, self._columns)
        self._rows, self._scores_MRN = rows, []
        here, columns = self._problem.own_places(rows)
        own_MR = self._query.new_zeros(len(self._problem.dims), rows.stop - rows.start)
        previous = 0
        product_RN = self._query.new_zeros(own_MR.shape[1], self._columns)
        for index, dim in enumerate(self._problem.dims):
            block = slice(previous, dim)
            product_RN = torch.addmm(product_RN, self._query[rows, block], self._passage[:, block].T)
            scores_RN = product_RN * self._norms.scaled_query_MB[index, rows, None] * self._norms.passage_MN[index]
            own_MR[index, here] = scores_RN[here, columns]
            scores_RN[here, columns] = MASKED
            self._scores_MRN.append(scores_RN if masked_RN is None else scores_RN.masked_fill_(masked_RN, MASKED))
            previous = dim
        self._own_MR = own_MR
        rivals_MR = torch.stack([(scores * self._exponent).logsumexp(1) for scores in self._scores_MRN])
        masked_pairs = torch.zeros((), dtype=torch.int64) if masked_RN is None else masked_RN.sum()
        return ChunkScores(self._own_MR, rivals_MR, self._scores_MRN[-1].amax(1), masked_pairs)

    def fold_columns(self) -> None:
        for index, scores_RN in enumerate(self._scores_MRN):
            chunk_N = (scores_RN * self._exponent).logsumexp(0)
            self._normalisers_MN[index] = torch.logaddexp(self._normalisers_MN[index], chunk_N)

    def column_normalisers(self) -> torch.Tensor:
        return self._normalisers_MN

    def add_gradients(
        self, shift_MR: torch.Tensor, missed_MR: torch.Tensor, column_shift_MN: torch.Tensor | None
    ) -> None:
        dims, count = self._problem.dims, len(self._query)
        here, columns = self._problem.own_places(self._rows)
        suffix_RN = torch.zeros_like(self._scores_MRN[0])
        for index in reversed(range(len(dims))):
            scale = self._problem.weights[index] / count
            scores_RN = self._scores_MRN[index]
            gradient_RN = (scores_RN * self._exponent - shift_MR[index, :, None]).exp_()
            if column_shift_MN is not None:
                columns_RN = (scores_RN * self._exponent - column_shift_MN[index]).exp_()
                gradient_RN.add_(columns_RN, alpha=self._problem.symmetric)
            gradient_RN[here, columns] = -missed_MR[index, here]
            gradient_RN.mul_(scale)
            scores_RN[here, columns] = self._own_MR[index, here]
            scores_RN.mul_(gradient_RN)
            self._row_terms_MB[index, self._rows] = scores_RN.sum(1)
            self._column_terms_MN[index] += scores_RN.sum(0)
            gradient_RN *= self._norms.scaled_query_MB[index, self._rows, None]
            suffix_RN += gradient_RN.mul_(self._norms.passage_MN[index])
            block = slice(dims[index - 1] if index else 0, dims[index])
            self._products[0][self._rows, block] = suffix_RN @ self._passage[:, block]
            self._products[1][:, block] += suffix_RN.T @ self._query[self._rows, block]

    def gradients(self) -> Gradients:
        inputs = self._query, self._passage
        return self._norms.complete(inputs, self._products, self._row_terms_MB, self._column_terms_MN)
