"""Tiles on a GPU: the library's matrix products on a chunk of rows, and Triton kernels for what is between them.

Each product is formed once, where kernels that keep no scores form it for every block of gradients
again: faster, for the memory of one chunk. float32, bfloat16 and float16 inputs; products and sums
are float32, and float32 inputs multiplied as PyTorch is told to (TF32 where that is allowed). The same
to the bit whenever it is run, without the symmetric term.
Shapes: B queries, N passages, K components, M dims, R rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton

from drama_dist.kernels import info_nce_streaming, norms
from drama_dist.kernels.problem import Problem
from drama_dist.kernels.tiles import FLOOR, ChunkScores, Gradients, row_chunks
from drama_dist.kernels.triton_tiles import INTERPRETED, best_score, check_dtypes, ranked

_SCORE_BYTES = 1 << 30
_MOST_ROWS = 16384
_ROW_STEP = 128
_ALIGNMENT = 16  # of a product's rows, in elements
_PROGRAMS = 1056  # eight for each multiprocessor of an H100
# Each thread has whole columns of a tile: only sums of rows are exchanged between threads.
BY_ROWS = {"BLOCK_R": 1, "BLOCK_C": 512, "num_warps": 4}
BY_COLUMNS = {"BLOCK_R": 2, "BLOCK_C": 512, "num_warps": 2}
# Where registers are too few for these:
BY_ROWS_SMALL = {"BLOCK_R": 1, "BLOCK_C": 512, "num_warps": 8}
BY_COLUMNS_SMALL = {"BLOCK_R": 1, "BLOCK_C": 1024, "num_warps": 8}
if INTERPRETED:
    BY_ROWS = BY_COLUMNS = BY_ROWS_SMALL = BY_COLUMNS_SMALL = {"BLOCK_R": 32, "BLOCK_C": 64, "num_warps": 1}
_MOST_DIMS = 3


def tiles_of(dims: int, symmetric: bool, teacher: bool, excluded: bool) -> tuple[dict[str, int], dict[str, int]]:
    """The tile of the kernel that goes along the rows, and of those that go down the columns."""
    few = dims <= _MOST_DIMS and not (symmetric or teacher or excluded)
    return (BY_ROWS, BY_COLUMNS) if few else (BY_ROWS_SMALL, BY_COLUMNS_SMALL)


def chunk_rows(rows: int, columns: int, dims: Sequence[int]) -> list[int]:
    """How many rows each chunk has; columns: of the largest part."""
    return [
        len(range(rows)[part]) for part in row_chunks(rows, columns, len(dims), _SCORE_BYTES, _MOST_ROWS, _ROW_STEP)
    ]


def held_bytes(rows: int, columns: int, dims: Sequence[int], threads: int) -> int:
    """What a call without a teacher holds at most beside its float32 inputs: a chunk's products, sums, gradients."""
    chunk = len(dims) * chunk_rows(rows, columns, dims)[0] * (columns + _ALIGNMENT)
    return 4 * chunk + 4 * (rows + columns) * (2 * max(dims) + 3 * len(dims))


class StreamingTiles:
    """See Tiles."""

    def __init__(self, queries_BK: torch.Tensor, passages_NK: torch.Tensor, temperature: float, problem: Problem):
        check_dtypes(queries_BK, passages_NK)
        self._inputs = tuple(side if side.stride(1) == 1 else side.contiguous() for side in (queries_BK, passages_NK))
        self._problem, self._columns = problem, len(passages_NK)
        self._temperature, self._exponent = temperature, 1 + problem.hardness * temperature
        begins = (0, *problem.dims[:-1])
        self._blocks = [slice(*ends) for ends in zip(begins, problem.dims, strict=True)]
        self._block_k = triton.next_power_of_2(max(block.stop - block.start for block in self._blocks))
        self._scaled_query_MB = self._inverse_norms(self._inputs[0], 1 / temperature)
        self._passage_MN = self._inverse_norms(self._inputs[1], 1.0)
        self._ids = self._documents()
        self._row_terms_MB = torch.empty_like(self._scaled_query_MB)
        self._column_terms_MN = torch.empty_like(self._passage_MN)
        self._column_normalisers_MN: torch.Tensor | None = None
        self._scales_M = self._passage_MN.new_tensor(problem.weights)
        self._masks = problem.passage_ids_N is not None or problem.teacher is not None
        self._row_tile, self._tile = tiles_of(
            len(problem.dims), problem.symmetric != 0, problem.teacher is not None, "excluded" in self._ids
        )
        self._rows = slice(0)
        self._scores_MRN = self._product_buffer()
        self._upstream_MRN = torch.empty(0)
        self._products: tuple[torch.Tensor, ...] = ()  # none, where nothing is learned
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
        blocks = triton.cdiv(count, self._row_tile["BLOCK_R"])
        splits, per_split = _shares(self._columns, blocks, self._row_tile["BLOCK_C"])
        maxima, sums = self._passage_MN.new_empty(2, splits, dims, count)
        own_MR = maxima.new_empty(dims, count)
        left_out = torch.empty(splits, count, dtype=torch.int32, device=maxima.device)
        info_nce_streaming.rows_kernel[(blocks, splits)](
            **self._chunk,
            maxima_ptr=maxima,
            sums_ptr=sums,
            own_ptr=own_MR,
            left_out_ptr=left_out,
            columns_per_split=per_split,
            **self._row_tile,
        )
        of_splits = maxima + sums.log()
        rivals_MR = of_splits.logsumexp(0) if splits > 1 else of_splits[0]
        masked_pairs = left_out.sum()  # nothing without ids or a teacher; else the positives are among them
        if self._masks:
            masked_pairs = masked_pairs - (self._ids["positives"][rows] >= 0).sum()
        return ChunkScores(own_MR, rivals_MR, best_score(maxima[:, -1].amax(0), self._exponent), masked_pairs)

    def fold_columns(self) -> None:
        count, dims = self._rows.stop - self._rows.start, len(self._problem.dims)
        tile = self._tile
        blocks = triton.cdiv(self._columns, tile["BLOCK_C"])
        splits, per_split = _shares(count, blocks, tile["BLOCK_R"])
        maxima, sums = self._passage_MN.new_empty(2, splits, dims, self._columns)
        info_nce_streaming.columns_kernel[(blocks, splits)](
            **self._chunk, maxima_ptr=maxima, sums_ptr=sums, rows_per_split=per_split, **tile
        )
        chunk_MN = (maxima + sums.log()).logsumexp(0)
        before = self._column_normalisers_MN
        self._column_normalisers_MN = chunk_MN if before is None else torch.logaddexp(before, chunk_MN)

    def column_normalisers(self) -> torch.Tensor:
        assert self._column_normalisers_MN is not None
        return self._column_normalisers_MN

    def add_gradients(
        self, shift_MR: torch.Tensor, missed_MR: torch.Tensor, column_shift_MN: torch.Tensor | None
    ) -> None:
        count, dims = self._rows.stop - self._rows.start, len(self._problem.dims)
        if not self._products:
            self._upstream_MRN, self._products = self._gradient_buffers()
        tile = self._tile
        blocks = triton.cdiv(self._columns, tile["BLOCK_C"])
        splits, per_split = _shares(count, blocks, tile["BLOCK_R"])
        row_terms = shift_MR.new_empty(blocks, dims, count)
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
            HAS_SYMMETRIC=column_shift_MN is not None,
            **tile,
        )
        self._row_terms_MB[:, self._rows] = row_terms.sum(0)
        if self._rows.start:
            self._column_terms_MN += column_terms.sum(0)
        else:
            torch.sum(column_terms, 0, out=self._column_terms_MN)
        self._add_products(count)

    def gradients(self) -> Gradients:
        self._scores_MRN = self._upstream_MRN = torch.empty(0)
        self._chunk = {}
        scale = 1 / self._temperature
        queries = self._finish(0, self._row_terms_MB, self._scaled_query_MB, scale)
        passages = self._finish(1, self._column_terms_MN, self._passage_MN, 1.0)
        return Gradients(queries, passages, self._row_terms_MB.sum() * (-scale / len(queries)))

    def _inverse_norms(self, vectors_RK: torch.Tensor, scale: float) -> torch.Tensor:
        rows, dims = len(vectors_RK), self._problem.dims
        norms_MR = torch.empty(len(dims), rows, dtype=torch.float32, device=vectors_RK.device)
        norms.norms_kernel[(rows,)](
            vectors_RK, vectors_RK.stride(0), norms_MR, rows, scale, FLOOR, DIMS=dims, BLOCK_K=self._block_k
        )
        return norms_MR

    def _finish(self, side: int, terms_MR: torch.Tensor, norms_MR: torch.Tensor, scale: float) -> torch.Tensor:
        """The gradient of one side in the inputs' precision, divided last: weights alone stay in range of float16."""
        vectors_RK = self._inputs[side]
        gradient_RK = torch.empty_like(self._products[side], dtype=vectors_RK.dtype)
        rows, width = gradient_RK.shape
        norms.finish_kernel[(rows,)](
            self._products[side],
            vectors_RK,
            vectors_RK.stride(0),
            terms_MR,
            norms_MR,
            gradient_RK,
            rows,
            width,
            scale,
            1 / len(self._inputs[0]),
            DIMS=self._problem.dims,
            BLOCK_K=self._block_k,
        )
        return gradient_RK

    def _add_products(self, count: int) -> None:
        query, passage = self._inputs
        for upstream_RN, block in zip(self._upstream_MRN, self._blocks, strict=True):
            upstream_RN = upstream_RN[:count, : self._columns]
            _multiply(upstream_RN, passage[:, block], self._products[0][self._rows, block])
            of_passages = self._products[1][:, block]
            _multiply(upstream_RN.T, query[self._rows, block], of_passages, add=self._rows.start > 0)

    def _product_buffer(self) -> torch.Tensor:
        """For a chunk's products: zeros after the last column."""
        rows = max(len(range(len(self._inputs[0]))[part]) for part in self.row_chunks())
        shape = len(self._blocks), rows, self._columns + -self._columns % _ALIGNMENT
        scores_MRN = torch.empty(shape, dtype=torch.float32, device=self._inputs[0].device)
        scores_MRN[..., self._columns :] = 0
        return scores_MRN

    def _gradient_buffers(self) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """For what a chunk's gradients are multiplied from, in the inputs' precision; and for both sides' products."""
        own = self._inputs[0].dtype
        scores = self._scores_MRN  # float32 operands may take their place
        upstream = scores if own == torch.float32 else torch.empty_like(scores, dtype=own)
        return upstream, tuple(torch.empty_like(side, dtype=torch.float32) for side in self._inputs)

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
            "x_norms_ptr": self._scaled_query_MB[:, rows].contiguous(),
            "y_norms_ptr": self._passage_MN,
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
    """In place: `result` (float32), or that much more, of operands in any precision. No autocast: that skips out=."""
    wanted: dict[str, Any] = {"out_dtype": torch.float32}
    if left.dtype == torch.float32 or not left.is_cuda or torch.version.hip:  # no half precision that gives float32
        left, right, wanted = left.float(), right.float(), {}
    if add:
        torch.addmm(result, left, right, **wanted, out=result)
    else:
        torch.mm(left, right, **wanted, out=result)
