"""Tiles on a GPU: the library's matrix products on a chunk of rows, and Triton kernels for what is between them.

Each product is formed once, where kernels that keep no scores form it for every block of gradients
again: faster, for the memory of one chunk. float32, bfloat16 and float16 inputs; products and sums
are float32. The same to the bit, whenever it is run.
Shapes: B queries, N passages, K components, M dims, R rows of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton

from drama_dist.kernels import info_nce_streaming
from drama_dist.kernels.problem import Problem
from drama_dist.kernels.tiles import ChunkScores, Gradients, Norms, row_chunks
from drama_dist.kernels.triton_tiles import check_dtypes, ranked

_SCORE_BYTES = 1 << 29
_MOST_ROWS = 16384
_ROW_STEP = 128
_ALIGNMENT = 16  # of a product's rows, in elements
_PROGRAMS = 1056  # eight for each multiprocessor of an H100
BY_ROWS = {"BLOCK_R": 2, "BLOCK_C": 512, "num_warps": 4}
BY_COLUMNS = {"BLOCK_R": 1, "BLOCK_C": 512, "num_warps": 2}


def chunk_rows(rows: int, columns: int, dims: Sequence[int]) -> list[int]:
    """How many rows each chunk has; columns: of the largest part."""
    return [
        len(range(rows)[part]) for part in row_chunks(rows, columns, len(dims), _SCORE_BYTES, _MOST_ROWS, _ROW_STEP)
    ]


def held_bytes(rows: int, columns: int, dims: Sequence[int], threads: int) -> int:
    """What a call holds at most beside its float32 inputs: a chunk's products and operands, and gradients."""
    chunk = len(dims) * chunk_rows(rows, columns, dims)[0] * (columns + _ALIGNMENT)
    return 2 * 4 * chunk + 4 * (rows + columns) * (max(dims) + 4 * len(dims))


class StreamingTiles:
    """See Tiles."""

    def __init__(self, queries_BK: torch.Tensor, passages_NK: torch.Tensor, temperature: float, problem: Problem):
        check_dtypes(queries_BK, passages_NK)
        self._inputs, self._problem, self._columns = (queries_BK, passages_NK), problem, len(passages_NK)
        self._norms = Norms(queries_BK, passages_NK, temperature, problem.dims)
        self._exponent = 1 + problem.hardness * temperature
        self._blocks = [
            slice(begin, end) for begin, end in zip((0, *problem.dims[:-1]), problem.dims, strict=True)
        ]
        self._ids = self._documents()
        self._products = tuple(torch.zeros_like(side, dtype=torch.float32) for side in self._inputs)
        self._row_terms_MB = torch.zeros_like(self._norms.query_MB)
        self._column_terms_MN = torch.zeros_like(self._norms.passage_MN)
        self._column_normalisers_MN = torch.full_like(self._norms.passage_MN, -math.inf)
        self._scales_M = self._norms.query_MB.new_tensor(problem.weights)
        self._found = problem.positives_B >= 0
        self._masks = problem.passage_ids_N is not None or problem.teacher is not None
        self._rows = slice(0)
        self._own_MR = self._rivals_MR = self._mean_MR = self._row_terms_MB  # of the chunk; mean: of negatives' scores
        self._scores_MRN, self._upstream_MRN = self._buffers()
        self._chunk: dict[str, Any] = {}

    def row_chunks(self) -> Iterator[slice]:
        most, dims = self._problem.most_columns(self._columns), len(self._problem.dims)
        return row_chunks(len(self._inputs[0]), most, dims, _SCORE_BYTES, _MOST_ROWS, _ROW_STEP)

    def scores(self, rows: slice) -> ChunkScores:
        query, passage = self._inputs
        count, dims = rows.stop - rows.start, len(self._problem.dims)
        self._rows = rows
        for scores_RN, block in zip(self._scores_MRN, self._blocks, strict=True):
            _multiply(query[rows, block], passage[:, block].T, scores_RN[:count, : self._columns])
        self._chunk = self._arguments(rows)
        blocks = triton.cdiv(count, BY_ROWS["BLOCK_R"])
        splits, per_split = _shares(self._columns, blocks, BY_ROWS["BLOCK_C"])
        maxima, sums, moments = self._norms.query_MB.new_empty(3, splits, dims, count)
        own_MR = maxima.new_empty(dims, count)
        left_out = torch.empty(splits, count, dtype=torch.int32, device=maxima.device)
        info_nce_streaming.rows_kernel[(blocks, splits)](
            **self._chunk,
            maxima_ptr=maxima,
            sums_ptr=sums,
            moments_ptr=moments,
            own_ptr=own_MR,
            left_out_ptr=left_out,
            columns_per_split=per_split,
            **BY_ROWS,
        )
        of_splits = maxima + sums.log()
        rivals_MR = of_splits.logsumexp(0)
        mean_MR = (of_splits.softmax(0) * moments / sums).sum(0) / self._exponent
        self._own_MR, self._rivals_MR, self._mean_MR = own_MR, rivals_MR, mean_MR
        masked_pairs = left_out.sum() - self._found[rows].sum() if self._masks else left_out.new_zeros(())
        return ChunkScores(own_MR, rivals_MR, maxima[:, -1].amax(0) / self._exponent, masked_pairs)

    def fold_columns(self) -> None:
        count, dims = self._rows.stop - self._rows.start, len(self._problem.dims)
        blocks = triton.cdiv(self._columns, BY_COLUMNS["BLOCK_C"])
        splits, per_split = _shares(count, blocks, BY_COLUMNS["BLOCK_R"])
        maxima, sums = self._norms.query_MB.new_empty(2, splits, dims, self._columns)
        info_nce_streaming.columns_kernel[(blocks, splits)](
            **self._chunk, maxima_ptr=maxima, sums_ptr=sums, rows_per_split=per_split, **BY_COLUMNS
        )
        chunk_MN = (maxima + sums.log()).logsumexp(0)
        self._column_normalisers_MN = torch.logaddexp(self._column_normalisers_MN, chunk_MN)

    def column_normalisers(self) -> torch.Tensor:
        return self._column_normalisers_MN

    def add_gradients(
        self, shift_MR: torch.Tensor, missed_MR: torch.Tensor, column_shift_MN: torch.Tensor | None
    ) -> None:
        count, dims = self._rows.stop - self._rows.start, len(self._problem.dims)
        blocks = triton.cdiv(self._columns, BY_COLUMNS["BLOCK_C"])
        splits, per_split = _shares(count, blocks, BY_COLUMNS["BLOCK_R"])
        symmetric = column_shift_MN is not None
        row_terms = shift_MR.new_empty(blocks if symmetric else 0, dims, count)
        column_terms = shift_MR.new_empty(splits, dims, self._columns)
        shifts = shift_MR.contiguous()
        info_nce_streaming.gradients_kernel[(blocks, splits)](
            **self._chunk,
            upstream_ptr=self._upstream_MRN,
            symmetric=self._problem.symmetric,
            scales_ptr=self._scales_M,
            shifts_ptr=shifts,
            missed_ptr=missed_MR.contiguous(),
            column_shifts_ptr=shifts if column_shift_MN is None else column_shift_MN.contiguous(),
            row_terms_ptr=row_terms,
            column_terms_ptr=column_terms,
            rows_per_split=per_split,
            HAS_SYMMETRIC=symmetric,
            **BY_COLUMNS,
        )
        negatives_MR = (self._rivals_MR - shift_MR).exp() * self._mean_MR - missed_MR * self._own_MR
        self._row_terms_MB[:, self._rows] = row_terms.sum(0) if symmetric else self._scales_M[:, None] * negatives_MR
        self._column_terms_MN += column_terms.sum(0)
        self._add_products(count)

    def gradients(self) -> Gradients:
        for sums in (*self._products, self._row_terms_MB, self._column_terms_MN):
            sums /= len(self._inputs[0])  # last: weights alone stay in range of float16
        self._scores_MRN = self._upstream_MRN = self._scores_MRN[:0]
        return self._norms.complete(self._inputs, self._products, self._row_terms_MB, self._column_terms_MN)

    def _add_products(self, count: int) -> None:
        query, passage = self._inputs
        for upstream_RN, block in zip(self._upstream_MRN, self._blocks, strict=True):
            upstream_RN = upstream_RN[:count, : self._columns]
            _multiply(upstream_RN, passage[:, block], self._products[0][self._rows, block])
            _multiply(upstream_RN.T, query[self._rows, block], self._products[1][:, block], add=True)

    def _buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A chunk's products and, in the inputs' precision, what its gradients are multiplied from."""
        rows = max(len(range(len(self._inputs[0]))[part]) for part in self.row_chunks())
        shape = len(self._blocks), rows, self._columns + -self._columns % _ALIGNMENT
        scores_MRN = torch.empty(shape, dtype=torch.float32, device=self._inputs[0].device)
        scores_MRN[..., self._columns :] = 0
        own = self._inputs[0].dtype
        return scores_MRN, scores_MRN if own == torch.float32 else torch.empty_like(scores_MRN, dtype=own)

    def _documents(self) -> dict[str, torch.Tensor]:
        """Positives and ids as int32, half the registers of int64: ids by their order. Without ids columns are ids."""
        problem = self._problem
        positives, own_ids = problem.positives_B.int(), problem.positive_ids()
        if problem.passage_ids_N is None or own_ids is None:
            return {"positives": positives, "own": positives}
        ids, own, excluded = ranked(problem.passage_ids_N, own_ids, problem.excluded_ids_BE)
        found = {"positives": positives, "own": own, "passages": ids}
        return found if excluded is None else found | {"excluded": excluded}

    def _arguments(self, rows: slice) -> dict[str, Any]:
        """What every kernel is told of a chunk."""
        ids, above = self._ids, self._above_margin(rows)
        own = ids["own"][rows]
        excluded = ids["excluded"][rows] if "excluded" in ids else None
        return {
            "products_ptr": self._scores_MRN,
            "stride": self._scores_MRN.stride(1),
            "dim_stride": self._scores_MRN.stride(0),
            "rows": rows.stop - rows.start,
            "columns": self._columns,
            "x_norms_ptr": self._norms.scaled_query_MB[:, rows].contiguous(),
            "y_norms_ptr": self._norms.passage_MN,
            "exponent": self._exponent,
            "positives_ptr": ids["positives"][rows],
            "own_ids_ptr": own,
            "passage_ids_ptr": ids.get("passages", own),
            "excluded_ptr": own if excluded is None else excluded,
            "excluded_count": 0 if excluded is None else excluded.shape[1],
            "above_ptr": own if above is None else above,
            "M": len(self._blocks),
            "HAS_IDS": "passages" in ids,
            "HAS_EXCLUDED": excluded is not None,
            "HAS_TEACHER": above is not None,
        }

    def _above_margin(self, rows: slice) -> torch.Tensor | None:
        """R × stride, int8: where a teacher's score is above the query's limit."""
        parts = self._problem.above_margin(rows)
        if not parts:
            return None
        return torch.nn.functional.pad(parts[0].to(torch.int8), (0, -self._columns % _ALIGNMENT)).contiguous()


def _shares(length: int, blocks: int, step: int) -> tuple[int, int]:
    """Into how many shares, of how many elements in whole steps, a length is cut, so that all processors have work."""
    shares = max(1, min(_PROGRAMS // blocks, triton.cdiv(length, 4 * step)))
    each = triton.cdiv(triton.cdiv(length, shares), step) * step
    return triton.cdiv(length, each), each


def _multiply(left: torch.Tensor, right: torch.Tensor, result: torch.Tensor, add: bool = False) -> None:
    """In place: `result` (float32), or that much more, of operands in any precision."""
    if left.is_cuda and left.dtype != torch.float32:
        if add:
            torch.addmm(result, left, right, out_dtype=torch.float32, out=result)
        else:
            torch.mm(left, right, out_dtype=torch.float32, out=result)
    elif add:
        result.addmm_(left.float(), right.float())
    else:
        result.copy_(left.float() @ right.float())
