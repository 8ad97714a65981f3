"""Tiles on a GPU: the library's matrix products on a chunk of rows, and Triton kernels for what is between them.

float32, bfloat16 and float16 inputs; products and sums are float32, and float32 operands, which are those of float16's
gradients too, multiplied as PyTorch is told to (TF32 where that is allowed). The same to the bit whenever it is run.
Shapes: B queries, N passages, K components, M dims, R rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import triton

from drama_dist.kernels.info_nce import gpu, score_kernels
from drama_dist.kernels.info_nce.problem import Contrast, Distillation, Problem
from drama_dist.kernels.info_nce.rows import ContrastRows, Rows, TeacherRows
from drama_dist.kernels.info_nce.tiles import Chunking

_ALIGNMENT = 16  # of a product's rows, in elements
_PROGRAMS = 1056  # eight for each multiprocessor of an H100
# Each thread has whole columns of a tile: only sums of rows are exchanged between threads.
BY_ROWS = {"BLOCK_R": 1, "BLOCK_C": 512, "num_warps": 4}
BY_COLUMNS = {"BLOCK_R": 2, "BLOCK_C": 512, "num_warps": 2}
# Where registers are too few for these:
BY_ROWS_SMALL = {"BLOCK_R": 1, "BLOCK_C": 512, "num_warps": 8}
BY_COLUMNS_SMALL = {"BLOCK_R": 2, "BLOCK_C": 512, "num_warps": 8}
if gpu.INTERPRETED:
    BY_ROWS = BY_COLUMNS = BY_ROWS_SMALL = BY_COLUMNS_SMALL = {"BLOCK_R": 32, "BLOCK_C": 64, "num_warps": 1}
_MOST_DIMS = 3


def tile_shapes(dims: int, excluded: bool) -> tuple[dict[str, int], dict[str, int]]:
    """The tile of the kernel that goes along the rows, and of the one that goes down the columns."""
    return (BY_ROWS, BY_COLUMNS) if dims <= _MOST_DIMS and not excluded else (BY_ROWS_SMALL, BY_COLUMNS_SMALL)


class CUDATiles:
    """See Tiles."""

    chunking: ClassVar[Chunking] = Chunking(score_bytes=1 << 30, most_rows=16384, row_step=128)

    @classmethod
    def held_bytes(cls, rows: int, columns: int, dims: Sequence[int], threads: int, teacher: int | None = None) -> int:
        """See Backend: a chunk's products, its sums by share, gradients; any threads."""
        count, planes = len(dims), len(dims) + (teacher is not None)
        chunk = cls.chunking.largest(rows, columns, planes)
        along, down = tile_shapes(count, excluded=False)
        products = planes * chunk * (columns + _ALIGNMENT)
        # Each share's maxima and sums, and what is made of them; later, in their place, the norms' terms.
        shares = gpu.shares(columns, triton.cdiv(chunk, along["BLOCK_R"]), along["BLOCK_C"], _PROGRAMS)[0]
        blocks = triton.cdiv(columns, down["BLOCK_C"])
        row_shares = gpu.shares(chunk, blocks, down["BLOCK_R"], _PROGRAMS)[0]
        sums = (4 if teacher is None else 7) * shares * planes * chunk
        terms = blocks * count * chunk + row_shares * count * columns
        ids = 10 * (rows + columns)  # int64 while they are ranked
        of_vectors = (rows + columns) * (2 * max(dims) + 3 * count) + 8 * count * chunk
        halved = 2 * (count * chunk * (columns + _ALIGNMENT) + (rows + columns) * max(dims))  # bytes, where rounded
        return 4 * (products + max(sums, terms) + ids + of_vectors) + halved

    def __init__(self, queries_BK: torch.Tensor, passages_NK: torch.Tensor, temperature: float, problem: Problem):
        self._vectors = gpu.Vectors(queries_BK, passages_NK, problem, 1 / temperature)
        self._problem, self._columns = problem, len(passages_NK)
        self._nothing = torch.empty(0, dtype=torch.int32, device=queries_BK.device)
        self._ids = gpu.documents(problem) if isinstance(problem, Contrast) else {}
        self._scales_M = self._vectors.norms[1].new_tensor(problem.weights)
        self._along, self._down = tile_shapes(len(problem.dims), "excluded" in self._ids)
        self._rows = slice(0)
        self._scores_MRN = self._product_buffer()
        self._upstream_MRN = torch.empty(0)
        self._chunk: dict[str, Any] = {}

    def scores(self, rows: slice) -> Rows:
        query, passage = self._vectors.sides
        count, problem = rows.stop - rows.start, self._problem
        self._rows = rows
        # A teacher's logits are behind.
        for scores_RN, block in zip(self._scores_MRN, self._vectors.blocks, strict=False):
            gpu.multiply(query[rows, block], passage[:, block].T, scores_RN[:count, : self._columns])
        self._chunk = self._arguments(rows)
        blocks = triton.cdiv(count, self._along["BLOCK_R"])
        splits, per_split = gpu.shares(self._columns, blocks, self._along["BLOCK_C"], _PROGRAMS)
        maxima, sums = self._scales_M.new_empty(2, splits, len(problem.dims), count)
        arguments = {
            **self._chunk,
            "maxima_ptr": maxima,
            "sums_ptr": sums,
            "columns_per_split": per_split,
            **self._along,
        }
        if isinstance(problem, Distillation):
            return self._soft_target_scores(problem, rows, (blocks, splits), arguments)
        return self._info_nce_scores(rows, (blocks, splits), arguments)

    def _info_nce_scores(self, rows: slice, grid: tuple[int, int], arguments: dict[str, Any]) -> ContrastRows:
        maxima = arguments["maxima_ptr"]
        positive_MR = maxima.new_empty(maxima.shape[1:])
        left_out = torch.empty(grid[1], maxima.shape[2], dtype=torch.int32, device=maxima.device)
        score_kernels.rows_kernel[grid](
            **arguments, **self._documents_of(rows), scores_ptr=positive_MR, left_out_ptr=left_out
        )
        masked_pairs = left_out.sum()
        if "passages" in self._ids:  # the positives are among them
            masked_pairs = masked_pairs - (self._ids["positives"][rows] >= 0).sum()
        return ContrastRows(positive_MR, _logsumexp(arguments), maxima[:, -1].amax(0), masked_pairs)

    def _soft_target_scores(
        self, problem: Distillation, rows: slice, grid: tuple[int, int], arguments: dict[str, Any]
    ) -> TeacherRows:
        maxima = arguments["maxima_ptr"]
        gpu.write_logits(problem, rows, self._scores_MRN[-1, : maxima.shape[2], : self._columns])
        highest, sums, terms = maxima.new_empty(3, len(maxima), maxima.shape[2])
        expected = torch.empty_like(maxima)
        score_kernels.soft_rows_kernel[grid](
            **arguments,
            teacher_maxima_ptr=highest,
            teacher_sums_ptr=sums,
            teacher_terms_ptr=terms,
            expected_ptr=expected,
        )
        return TeacherRows.of_parts(_logsumexp(arguments), highest, sums, terms, expected)

    def add_gradients(self, shift_MR: torch.Tensor, other: torch.Tensor) -> None:
        dims, count = shift_MR.shape
        if not self._vectors.products:
            self._upstream_MRN = self._gradient_buffer()
        blocks = triton.cdiv(self._columns, self._down["BLOCK_C"])
        splits, per_split = gpu.shares(count, blocks, self._down["BLOCK_R"], _PROGRAMS)
        row_terms = shift_MR.new_empty(blocks, dims, count)
        column_terms = shift_MR.new_empty(splits, dims, self._columns)
        score_kernels.gradients_kernel[(blocks, splits)](
            **self._chunk,
            **self._documents_of(self._rows),
            HAS_TEACHER=isinstance(self._problem, Distillation),
            upstream_ptr=self._upstream_MRN,
            scales_ptr=self._scales_M,
            shifts_ptr=shift_MR.contiguous(),
            other_ptr=other.contiguous(),
            row_terms_ptr=row_terms,
            column_terms_ptr=column_terms,
            rows_per_split=per_split,
            **self._down,
        )
        row_terms_MB, column_terms_MN = self._vectors.terms
        row_terms_MB[:, self._rows] = row_terms.sum(0)
        if self._rows.start:
            column_terms_MN += column_terms.sum(0)
        else:
            torch.sum(column_terms, 0, out=column_terms_MN)
        self._vectors.add_products(self._rows, self._upstream_MRN[:, :count, : self._columns])

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        self._scores_MRN = self._upstream_MRN = torch.empty(0)
        self._chunk = {}
        return self._vectors.gradients()

    def _product_buffer(self) -> torch.Tensor:
        """For a chunk's products, and a teacher's logits behind them: zeros after the last column."""
        planes = len(self._problem.dims) + isinstance(self._problem, Distillation)
        rows = self.chunking.largest(len(self._vectors.sides[0]), self._problem.most_columns(self._columns), planes)
        shape = planes, rows, self._columns + -self._columns % _ALIGNMENT
        scores_MRN = torch.empty(shape, dtype=torch.float32, device=self._scales_M.device)
        scores_MRN[..., self._columns :] = 0
        return scores_MRN

    def _gradient_buffer(self) -> torch.Tensor:
        """For dL/dA of a chunk, bfloat16 for bfloat16 operands and else float32.

        float16 would not hold dL/dA of a short vector, nor of a long one whose first components are small.
        """
        halved = self._vectors.sides[0].dtype == torch.bfloat16
        products = self._scores_MRN[: len(self._problem.dims)]
        return torch.empty_like(products, dtype=torch.bfloat16) if halved else products

    def _arguments(self, rows: slice) -> dict[str, Any]:
        """What all kernels are told of a chunk."""
        return {
            "products_ptr": self._scores_MRN,
            "stride": self._scores_MRN.stride(1),
            "dim_stride": self._scores_MRN.stride(0),
            "rows": rows.stop - rows.start,
            "columns": self._columns,
            "x_norms_ptr": self._vectors.norms[0][:, rows].contiguous(),
            "y_norms_ptr": self._vectors.norms[1],
            "M": len(self._problem.dims),
        }

    def _documents_of(self, rows: slice) -> dict[str, Any]:
        """What InfoNCE's kernels are told of a chunk's documents; with a teacher there is nothing to say."""
        ids = self._ids or {"positives": self._nothing, "positive ids": self._nothing}
        positive_ids = ids["positive ids"][rows]
        excluded = ids["excluded"][rows] if "excluded" in ids else None
        return {
            "positives_ptr": ids["positives"][rows],
            "positive_ids_ptr": positive_ids,
            "passage_ids_ptr": ids.get("passages", positive_ids),
            "excluded_ptr": positive_ids if excluded is None else excluded,
            "excluded_count": 0 if excluded is None else excluded.shape[1],
            "HAS_IDS": "passages" in ids,
            "HAS_EXCLUDED": excluded is not None,
        }


def _logsumexp(arguments: dict[str, Any]) -> torch.Tensor:
    """M × R, from each share's maxima and sums."""
    of_splits = arguments["maxima_ptr"] + arguments["sums_ptr"].log()
    return of_splits.logsumexp(0) if len(of_splits) > 1 else of_splits[0]
