"""Tiles on a GPU, fused: scores are formed inside the Triton kernels and never written.

The backward pass forms them again, and hands the gradients' operands of a chunk of rows to the library's products.
float32, bfloat16 and float16 inputs; products and sums are float32. Float32 operands are multiplied as PyTorch is told
to (TF32 where that is allowed), and float16's gradients come from float32 operands. The same to the bit whenever it is
run. The older form is cuda.py; which of them `auto` takes is said in backends.py.
Shapes: B queries, N passages, K components, M dims, R rows of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from drama_dist.kernels.info_nce import fused_kernels, fused_row_kernels, gpu
from drama_dist.kernels.info_nce.problem import Contrast, Distillation, Problem
from drama_dist.kernels.info_nce.rows import ContrastRows, Rows, TeacherRows
from drama_dist.kernels.info_nce.tiles import Chunking, block_ends, pad_blocks

_PROGRAMS = 528  # four for each multiprocessor of an H100
_LOG2_E = math.log2(math.e)
_LARGE_SHARED = ((9, 0), (10, 0), (10, 3))  # compute capabilities with 227 KB for a block


@dataclass(frozen=True)
class Shape:
    """Of a tile: queries, passages, components of a step; warps, and steps that are loaded ahead."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        """What a launch is told."""
        blocks = {"BLOCK_R": self.rows, "BLOCK_C": self.columns, "BLOCK_K": self.depth}
        return {**blocks, "num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Shapes:
    """Of the kernels: rows, gradients, and a row's positive (queries and passages alike)."""

    rows: Shape
    gradients: Shape
    positives: Shape


_INTERPRETED = Shapes(Shape(32, 64, 16, 1, 1), Shape(32, 64, 16, 1, 1), Shape(32, 32, 16, 1, 1))
_LARGE = Shapes(Shape(128, 128, 64, 8, 3), Shape(128, 128, 64, 8, 3), Shape(64, 64, 64, 4, 3))
_SMALL = Shapes(Shape(64, 64, 64, 4, 3), Shape(64, 64, 64, 4, 3), Shape(64, 64, 64, 4, 3))
_FLOAT32 = Shapes(Shape(64, 64, 32, 8, 2), Shape(64, 64, 32, 8, 2), Shape(32, 32, 32, 4, 2))
# The gradients of every dim stay in registers to the last one.
_MOST_DIMS = 3
_LARGE_MANY = replace(_LARGE, gradients=Shape(64, 64, 64, 4, 3))
_SMALL_MANY = replace(_SMALL, gradients=Shape(64, 64, 64, 8, 3))
TILES: Shapes | None = None  # in place of what `shapes` chooses, for benchmarks and tests


def shapes(operand: torch.dtype, large_shared: bool, dims: int) -> Shapes:
    """Of the kernels, for operands of a precision and so many dims; large_shared: on chips with much shared memory."""
    if TILES is not None:
        return TILES
    if gpu.INTERPRETED:
        return _INTERPRETED
    if operand == torch.float32:
        return _FLOAT32
    if dims > _MOST_DIMS:
        return _LARGE_MANY if large_shared else _SMALL_MANY
    return _LARGE if large_shared else _SMALL


def _has_large_shared(device: torch.device) -> bool:
    of_nvidia = device.type == "cuda" and torch.version.hip is None  # AMD numbers its chips so too
    return of_nvidia and torch.cuda.get_device_capability(device) in _LARGE_SHARED


class FusedTiles:
    """See Tiles."""

    # dL/dA of a chunk, counted as float32, of which bfloat16 takes half.
    chunking: ClassVar[Chunking] = Chunking(score_bytes=3 << 29, most_rows=16384, row_step=256)

    @classmethod
    def held_bytes(cls, rows: int, columns: int, dims: Sequence[int], threads: int, teacher: int | None = None) -> int:
        """See Backend: gradients' operands of a chunk, a teacher's logits, sums by share, padded copies; any threads.

        Only with gradients: without them there is nothing of the size of scores, but for a teacher's logits.
        """
        count, planes = len(dims), len(dims) + (teacher is not None)
        chunk = cls.chunking.largest(rows, columns, planes)
        tiles = shapes(torch.float32, False, count)
        wide = _padded(columns, _pad(tiles))
        upstream = count * wide * _padded(chunk, tiles.gradients.rows)
        logits = 0 if teacher is None else chunk * (columns + 16)
        splits = gpu.shares(columns, triton.cdiv(chunk, tiles.rows.rows), tiles.rows.columns, _PROGRAMS)[0]
        down = gpu.shares(chunk, triton.cdiv(columns, tiles.gradients.columns), tiles.gradients.rows, _PROGRAMS)[0]
        sums = (4 if teacher is None else 8) * splits * planes * chunk
        terms = 2 * down * count * columns
        ends = block_ends(dims, tiles.rows.depth)
        copies = (2 * rows + columns) * ends[-1]
        ids = 14 * (rows + columns)  # int64 while they are ranked and counted
        of_vectors = (rows + columns) * (2 * max(dims) + 3 * count) + 16 * count * chunk
        return 4 * (upstream + logits + sums + terms + copies + ids + of_vectors)

    def __init__(self, queries_BK: torch.Tensor, passages_NK: torch.Tensor, temperature: float, problem: Problem):
        operand = torch.bfloat16 if problem.rounded and queries_BK.dtype == torch.float32 else queries_BK.dtype
        self._shapes = shapes(operand, _has_large_shared(queries_BK.device), len(problem.dims))
        pad = _pad(self._shapes)
        assert not self.chunking.row_step % self._shapes.rows.rows, "chunks begin where tiles do"
        scale = _LOG2_E / temperature
        self._vectors = gpu.Vectors(queries_BK, passages_NK, problem, scale, fused_kernels.NEAR_ZERO, pad)
        self._problem, self._columns, self._lowest = problem, len(passages_NK), -2 * scale
        depth = self._shapes.rows.depth
        self._ends = tuple(block_ends(problem.dims, depth))
        self._operands = [pad_blocks(side, problem.dims, depth) for side in self._vectors.sides]
        self._documents = _Documents(problem, len(queries_BK), pad)
        self._weights_M = self._vectors.norms[1].new_tensor(problem.weights)
        self._scales_M = self._weights_M / _LOG2_E
        self._rows = slice(0)
        self._own: dict[str, torch.Tensor] = {}  # of the chunk's rows, over this part of the columns
        self._logits_RN = self._upstream_CR = torch.empty(0)

    def scores(self, rows: slice) -> Rows:
        self._rows = rows
        if isinstance(self._problem, Distillation):
            return self._soft_rows(self._problem, rows)
        return self._contrast_rows(rows)

    def add_gradients(self, shift_MR: torch.Tensor, other: torch.Tensor) -> None:
        dims, count, tile = len(self._problem.dims), shift_MR.shape[1], self._shapes.gradients
        padded = _padded(count, tile.rows)
        has_teacher = isinstance(self._problem, Distillation)
        shifts, others, positives = self._shifted(shift_MR.contiguous(), other.contiguous(), padded, has_teacher)
        height = self._vectors.norms[1].shape[1]
        if not self._vectors.products:
            self._upstream_CR = self._upstream_buffer(dims * height, padded)
        blocks = triton.cdiv(self._columns, tile.columns)
        splits, per_split = gpu.shares(count, blocks, tile.rows, _PROGRAMS)
        column_terms = shift_MR.new_empty(splits, dims, self._columns)
        fused_kernels.gradients_kernel[(blocks, splits)](
            **self._sides(tile),
            logits=self._logits(tile) if has_teacher else None,
            upstream=TensorDescriptor.from_tensor(self._upstream_CR, [tile.columns, tile.rows]),
            **self._norms(self._rows),
            **self._documents.of(self._rows),
            positives_ptr=positives,
            scales_ptr=self._scales_M,
            shifts_ptr=shifts,
            other_ptr=others,
            r_stride=padded,
            column_terms_ptr=column_terms,
            rows_per_split=per_split,
            HAS_TEACHER=has_teacher,
            **tile.options,
        )
        of_columns_MN = self._vectors.terms[1][:, : self._columns]
        if self._rows.start:
            of_columns_MN += column_terms.sum(0)
        else:
            torch.sum(column_terms, 0, out=of_columns_MN)
        planes = self._upstream_CR.view(dims, height, -1)
        self._vectors.add_products(self._rows, planes[:, : self._columns, :count].transpose(1, 2))

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        self._logits_RN = self._upstream_CR = torch.empty(0)
        self._own, self._operands = {}, []
        return self._vectors.gradients()

    def _contrast_rows(self, rows: slice) -> ContrastRows:
        tile, dims, count = self._shapes.rows, len(self._problem.dims), rows.stop - rows.start
        blocks = triton.cdiv(count, tile.rows)
        splits, per_split = gpu.shares(self._columns, blocks, tile.columns, _PROGRAMS)
        maxima, sums, moments = parts = self._weights_M.new_empty(3, splits, dims, count)
        fused_kernels.rows_kernel[(blocks, splits)](
            **self._sides(tile),
            **self._norms(rows),
            **self._documents.of(rows),
            maxima_ptr=maxima,
            sums_ptr=sums,
            moments_ptr=moments,
            columns_per_split=per_split,
            **tile.options,
        )
        logsumexp_MR, best_R = self._merged(parts, rows)
        self._own["target"] = positive_MR = self._positive_scores(rows)
        return ContrastRows(positive_MR, logsumexp_MR, best_R, self._documents.left_out_B[rows].sum())

    def _soft_rows(self, problem: Distillation, rows: slice) -> TeacherRows:
        tile, dims, count = self._shapes.rows, len(problem.dims), rows.stop - rows.start
        if not len(self._logits_RN):
            planes = dims + 1
            most = self.chunking.largest(len(self._operands[0]), problem.most_columns(self._columns), planes)
            self._logits_RN = gpu.logits_buffer(most, self._columns, self._weights_M.device)
        gpu.write_logits(problem, rows, self._logits_RN[:count, : self._columns])
        blocks = triton.cdiv(count, tile.rows)
        splits, per_split = gpu.shares(self._columns, blocks, tile.columns, _PROGRAMS)
        parts = self._weights_M.new_empty(4, splits, dims, count)
        highest, teacher_sums, terms = self._weights_M.new_empty(3, splits, count)
        fused_kernels.soft_rows_kernel[(blocks, splits)](
            **self._sides(tile),
            logits=self._logits(tile),
            **self._norms(rows),
            maxima_ptr=parts[0],
            sums_ptr=parts[1],
            moments_ptr=parts[2],
            expected_ptr=parts[3],
            teacher_maxima_ptr=highest,
            teacher_sums_ptr=teacher_sums,
            teacher_terms_ptr=terms,
            columns_per_split=per_split,
            **tile.options,
        )
        logsumexp_MR, _ = self._merged(parts[:3], rows)
        expected = parts[3] * self._vectors.norms[0][:, rows] / _LOG2_E
        merged = TeacherRows.of_parts(logsumexp_MR, highest, teacher_sums, terms, expected)
        self._own |= {"target": merged.expected_MR, "teacher": merged.teacher_R}
        return merged

    def _merged(self, parts: torch.Tensor, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """logsumexp, M × R, and the highest score at the largest dim, R; the rest is kept."""
        _, splits, dims, count = parts.shape
        most, total, mean, logsumexp, best = parts.new_empty(5, dims, count)
        norms = self._vectors.norms[0]
        fused_row_kernels.merge_kernel[(triton.cdiv(count, 128), dims)](
            *parts,
            splits,
            count,
            dims,
            norms[:, rows.start :],
            norms.stride(0),
            self._lowest,
            most,
            total,
            mean,
            logsumexp,
            best,
            BLOCK_R=128,
        )
        self._own = {"most": most, "total": total, "mean": mean, "logsumexp": logsumexp}
        return logsumexp, best[-1]

    def _positive_scores(self, rows: slice) -> torch.Tensor:
        tile, count = self._shapes.positives, rows.stop - rows.start
        positives_R = self._documents.positives_B[rows]
        of_positives_RK = self._operands[1][positives_R.clamp_min(0)]
        scores_MR = self._weights_M.new_empty(len(self._problem.dims), count)
        fused_row_kernels.positives_kernel[(triton.cdiv(count, tile.rows),)](
            TensorDescriptor.from_tensor(self._operands[0][rows], [tile.rows, tile.depth]),
            TensorDescriptor.from_tensor(of_positives_RK, [tile.rows, tile.depth]),
            count,
            **self._norms(rows),
            positives_ptr=positives_R,
            scores_ptr=scores_MR,
            ENDS=self._ends,
            BLOCK_R=tile.rows,
            BLOCK_K=tile.depth,
            PRECISION=_precision(),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        return scores_MR

    def _shifted(
        self, shift_MR: torch.Tensor, other: torch.Tensor, padded: int, has_teacher: bool
    ) -> tuple[torch.Tensor, ...]:
        """What gradients_kernel loads of rows: shifts, what goes with them, positives."""
        dims, count = shift_MR.shape
        shifts, others = shift_MR.new_empty(2, dims, padded)
        positives = torch.empty(dims, padded, dtype=torch.int32, device=shifts.device)
        row_terms = self._vectors.terms[0]
        block = self._shapes.gradients.rows
        fused_row_kernels.shifts_kernel[(padded // block, dims)](
            shift_MR,
            other,
            count,
            self._own["most"],
            self._own["total"],
            self._own["mean"],
            self._own["logsumexp"],
            self._own["target"],
            self._own["teacher"] if has_teacher else None,
            self._documents.positives_B[self._rows],
            self._weights_M,
            shifts,
            others,
            positives,
            padded,
            row_terms[:, self._rows.start :],
            row_terms.stride(0),
            HAS_TEACHER=has_teacher,
            BLOCK_R=block,
        )
        return shifts, others, positives

    def _upstream_buffer(self, height: int, width: int) -> torch.Tensor:
        """For dL/dA of the largest chunk, transposed, which is the first: bfloat16 for bfloat16 operands, else float32.

        float16 would not hold dL/dA of a short vector, nor of a long one whose first components are small.
        """
        halved = self._vectors.sides[0].dtype == torch.bfloat16
        dtype = torch.bfloat16 if halved else torch.float32
        return torch.empty(height, width, dtype=dtype, device=self._weights_M.device)

    def _sides(self, tile: Shape) -> dict[str, Any]:
        """What the kernels that see all columns are told of a chunk's vectors."""
        queries, passages = self._operands
        return {
            "x": TensorDescriptor.from_tensor(queries[self._rows], [tile.rows, tile.depth]),
            "y": TensorDescriptor.from_tensor(passages, [tile.columns, tile.depth]),
            "rows": self._rows.stop - self._rows.start,
            "columns": self._columns,
            "ENDS": self._ends,
            "PRECISION": _precision(),
        }

    def _logits(self, tile: Shape) -> TensorDescriptor:
        logits_RN = self._logits_RN[: self._rows.stop - self._rows.start, : self._columns]
        return TensorDescriptor.from_tensor(logits_RN, [tile.rows, tile.columns])

    def _norms(self, rows: slice) -> dict[str, Any]:
        queries, passages = self._vectors.norms
        return {
            "x_norms_ptr": queries[:, rows.start :],
            "x_stride": queries.stride(0),
            "y_norms_ptr": passages,
            "y_stride": passages.stride(0),
        }


class _Documents:
    """Which columns count, as the kernels are told: int32, padded to whole tiles."""

    def __init__(self, problem: Problem, rows: int, pad: int):
        ids = gpu.documents(problem) if isinstance(problem, Contrast) else {}
        self._has_ids, self._excluded = "passages" in ids, ids.get("excluded")
        nothing = torch.empty(0, dtype=torch.int32)
        self._passages = _lengthened(ids["passages"], pad) if self._has_ids else None
        self.left_out_B = _left_out(ids) if ids else nothing  # of the passages here
        self.positives_B = _lengthened(ids["positives"], pad) if ids else nothing
        self._positive_ids = _lengthened(ids["positive ids"], pad) if ids else nothing

    def of(self, rows: slice) -> dict[str, Any]:
        """What the kernels are told of a chunk; with a teacher there is nothing to say."""
        positive_ids_R = self._positive_ids[rows.start :]
        return {
            "positive_ids_ptr": positive_ids_R,
            "passage_ids_ptr": positive_ids_R if self._passages is None else self._passages,
            "excluded_ptr": positive_ids_R if self._excluded is None else self._excluded[rows],
            "excluded_count": 0 if self._excluded is None else self._excluded.shape[1],
            "HAS_IDS": self._has_ids,
            "HAS_EXCLUDED": self._excluded is not None,
        }


def _left_out(ids: dict[str, torch.Tensor]) -> torch.Tensor:
    """How many passages are neither a row's positive nor a negative, B."""
    positives, positive_ids = ids["positives"], ids["positive ids"]
    if "passages" not in ids:
        return torch.zeros_like(positives)
    excluded = ids.get("excluded", positive_ids[:, None][:, :0])
    most = len(ids["passages"]) + positive_ids.numel() + excluded.numel()  # as many different ids, and no more
    counts = positives.new_zeros(most)
    counts.scatter_add_(0, ids["passages"].long(), torch.ones_like(ids["passages"]))
    left_out = counts[positive_ids.long()] - (positives >= 0).int()
    if excluded.shape[1]:
        ordered = excluded.sort(1).values
        first = torch.ones_like(ordered, dtype=torch.bool)
        first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        first &= ordered != positive_ids[:, None]
        left_out = left_out + (counts[ordered.long()] * first).sum(1)
    return left_out


def _lengthened(numbers: torch.Tensor, pad: int) -> torch.Tensor:
    """With −1 up to a multiple of `pad`."""
    return torch.nn.functional.pad(numbers, (0, -len(numbers) % pad), value=-1)


def _padded(length: int, step: int) -> int:
    return triton.cdiv(length, step) * step


def _pad(tiles: Shapes) -> int:
    """What every tile's rows and columns divide."""
    return max(size for tile in (tiles.rows, tiles.gradients, tiles.positives) for size in (tile.rows, tile.columns))


def _precision() -> str:
    """Of float32 operands."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
