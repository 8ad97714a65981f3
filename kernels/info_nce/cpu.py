"""Tiles compiled for this CPU from tiles.cpp: scores, masks, exponentials and products in cache, in one pass.

Covers the library's operands, their layout, and threads. bfloat16 operands where the inputs are bfloat16, float32 else;
sums are float32 always. For a given number of threads the result is the same to the bit.
Shapes: B queries, N passages, K components, M dims, R rows of a chunk, T components of a teacher; Kp and Np padded.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import torch
from torch.nn.functional import pad

from drama_dist.kernels.info_nce.problem import Contrast, Distillation, Problem
from drama_dist.kernels.info_nce.rows import MASKED, ContrastRows, Rows, TeacherRows
from drama_dist.kernels.info_nce.tiles import (
    Chunking,
    add_norm_terms,
    block_ends,
    inverse_norms,
    pad_blocks,
    unpad_blocks,
)
from drama_dist.kernels.native import library, suffix

_STRIP = 64
_DEPTH_STEP = 32  # the largest of any build
_INTEGERS = ("rows", "padded_rows", "columns", "components", "dims", "teacher_components")
_ORDER = (  # as in tiles.cpp
    *_INTEGERS,
    "ends",
    "queries",
    "queries_transposed",
    "passages_by_depth",
    "passages_by_column",
    "query_norms",
    "passage_norms",
    "masked",
    "positives",
    "scores",
    "positive_scores",
    "maxima",
    "sums",
    "scales",
    "shifts",
    "missed",
    "row_terms",
    "column_terms",
    "query_products",
    "passage_products",
    "suffix",
    "upstream",
    "upstream_packed",
    "teacher_queries",
    "teacher_passages",
    "sparse_starts",
    "sparse_columns",
    "sparse_values",
    "teacher_logits",
    "teacher_weights",
    "teacher_maxima",
    "teacher_sums",
    "teacher_terms",
    "expected",
    "teacher_shifts",
)
Operands = dict[str, torch.Tensor | int]


class _Chunk(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64 if name in _INTEGERS else ctypes.c_void_p) for name in _ORDER]


def extension() -> ctypes.CDLL | None:
    """The compiled loss kernels; None (with one warning) where they cannot be built."""
    return library(Path(__file__).with_name("tiles.cpp"), "the loss goes on with slower PyTorch operations")


class CPUTiles:
    """See Tiles."""

    # Steps are whole register tiles of 6 rows or of 16, and whole steps of a product's depth.
    chunking: ClassVar[Chunking] = Chunking(score_bytes=1 << 27, most_rows=576, row_step=96)

    @classmethod
    def held_bytes(cls, rows: int, columns: int, dims: Sequence[int], threads: int, teacher: int | None = None) -> int:
        """See Backend."""
        tile, planes = 2 * _STRIP, len(dims) + (teacher is not None)
        padded, width = -(-columns // tile) * tile, block_ends(dims, _STRIP)[-1]
        chunk = -(-cls.chunking.largest(rows, columns, planes) // _DEPTH_STEP) * _DEPTH_STEP
        of_teacher = 2 * padded * teacher + threads * chunk * tile if teacher is not None else 0  # padded, packed
        passages = (4 if columns % tile else 3) * padded * width  # padded, in both layouts, and products
        of_columns = 2 * len(dims) * padded  # norms and terms
        scratch = threads * chunk * (width + 3 * tile) + chunk * width
        floats = passages + of_columns + of_teacher + planes * chunk * padded + scratch + rows * width
        return 4 * floats + 2 * chunk * columns

    def __init__(self, queries_BK: torch.Tensor, passages_NK: torch.Tensor, temperature: float, problem: Problem):
        both = {queries_BK.dtype, passages_NK.dtype}
        self._dtype = torch.bfloat16 if both == {torch.bfloat16} else torch.float32
        self._inputs = queries_BK, passages_NK
        self._problem, self._columns = problem, len(passages_NK)
        self._norms = tuple(inverse_norms(side, problem.dims) for side in self._inputs)
        self._scaled_norms_MB = self._norms[0] / temperature
        self._tile = _constant("tile_columns")
        self._depth_step = _constant(f"depth_step{suffix(self._dtype)}")
        self._threads = torch.get_num_threads()
        self._ends = block_ends(problem.dims, _STRIP)
        self._queries = pad_blocks(queries_BK.to(self._dtype), problem.dims, _STRIP)
        self._column_terms_MN = torch.zeros(0)
        self._passage_products = torch.zeros(0)
        self._operands = self._of_all_chunks() | self._of_teacher()
        self._chunk: Operands = {}
        self._rows = slice(0)
        self._query_gradient = torch.empty_like(queries_BK)
        self._scores = torch.empty(0)

    def _of_all_chunks(self) -> Operands:
        problem, tile = self._problem, self._tile
        tiles = -(-self._columns // tile)
        passages = pad_blocks(self._inputs[1].to(self._dtype), problem.dims, _STRIP)
        extra = tiles * tile - self._columns
        passages = pad(passages, (0, 0, 0, extra)) if extra else passages  # pad copies in any case
        lane = 2 if self._dtype == torch.bfloat16 else 1
        kp = self._ends[-1]
        norms_MN = pad(self._norms[1], (0, extra)).contiguous()
        count = len(self._inputs[0])
        self._column_terms_MN = torch.zeros_like(norms_MN)
        self._passage_products = torch.zeros(tiles, kp, tile)
        return {
            "columns": self._columns,
            "components": kp,
            "dims": len(problem.dims),
            "ends": torch.tensor(self._ends),
            "passages_by_depth": _strips(passages, lane),
            "passages_by_column": passages.view(tiles, tile // lane, lane, kp // _STRIP, _STRIP)
            .permute(0, 3, 1, 4, 2)
            .contiguous(),
            "passage_norms": norms_MN,
            "scales": torch.tensor([weight / count for weight in problem.weights], dtype=torch.float32),
            "column_terms": self._column_terms_MN,
            "passage_products": self._passage_products,
        }

    def _of_teacher(self) -> Operands:
        """Of all chunks; nothing without a teacher."""
        if not isinstance(self._problem, Distillation):
            return {}
        teacher = self._problem.teacher
        passages = pad(teacher.passages_NT, (0, 0, 0, -self._columns % self._tile))
        operands: Operands = {"teacher_components": passages.shape[1], "teacher_passages": _strips(passages, 1)}
        if teacher.sparse is not None:
            operands["sparse_columns"] = teacher.sparse.columns.to(torch.int32).contiguous()
            operands["sparse_values"] = teacher.sparse.values.contiguous()
        return operands

    def scores(self, rows: slice) -> Rows:
        self._rows = rows
        problem = self._problem
        dims, count = len(problem.dims), rows.stop - rows.start
        padded = -(-count // self._depth_step) * self._depth_step
        plane = -(-self._columns // self._tile) * count * self._tile
        planes = dims + isinstance(problem, Distillation)
        if self._scores.numel() < planes * plane:
            self._scores = torch.empty(planes * plane)
        self._chunk = {
            "rows": count,
            "padded_rows": padded,
            "queries": self._queries[rows],
            "queries_transposed": pad(self._queries[rows].T, (0, padded - count)).contiguous(),
            "query_norms": self._scaled_norms_MB[:, rows].contiguous(),
            "scores": self._scores,
        }
        maxima = torch.full((self._threads, dims, count), -torch.inf)
        sums = torch.zeros_like(maxima)
        suffix = torch.empty(self._threads, count, self._tile)
        of_threads = {"maxima": maxima, "sums": sums, "suffix": suffix}
        if isinstance(problem, Distillation):
            return self._soft_target_scores(problem, rows, self._scores[dims * plane :], of_threads)
        assert isinstance(problem, Contrast)
        return self._info_nce_scores(problem, rows, of_threads)

    def _info_nce_scores(self, problem: Contrast, rows: slice, of_threads: dict[str, torch.Tensor]) -> ContrastRows:
        masked_RN = problem.masked(rows)
        positive_MR = torch.zeros(of_threads["sums"].shape[1:])
        self._chunk |= {"positives": problem.positives_B[rows].contiguous(), "positive_scores": positive_MR}
        if masked_RN is not None:
            self._chunk["masked"] = masked_RN.contiguous()
        self._run("scores", of_threads)
        masked_pairs = torch.zeros((), dtype=torch.int64) if masked_RN is None else masked_RN.sum()
        best_R = of_threads["maxima"][:, -1].amax(0)
        return ContrastRows(positive_MR, _logsumexp(of_threads), best_R, masked_pairs)

    def _soft_target_scores(
        self, problem: Distillation, rows: slice, logits: torch.Tensor, of_threads: dict[str, torch.Tensor]
    ) -> TeacherRows:
        teacher, sums = problem.teacher, of_threads["sums"]
        self._chunk |= {"teacher_queries": teacher.queries_BT[rows].contiguous(), "teacher_logits": logits}
        if teacher.sparse is not None:
            self._chunk["sparse_starts"] = teacher.sparse.starts[rows.start : rows.stop + 1].contiguous()
        names = ("teacher_maxima", "teacher_sums", "teacher_terms")
        maxima, weights, terms = (torch.full_like(sums[:, 0], value) for value in (MASKED, 0, 0))
        expected = torch.zeros_like(sums)
        scratch = {"teacher_weights": torch.empty_like(of_threads["suffix"]), "expected": expected}
        self._run("scores", of_threads | scratch | dict(zip(names, (maxima, weights, terms), strict=True)))
        return TeacherRows.of_parts(_logsumexp(of_threads), maxima, weights, terms, expected)

    def add_gradients(self, shift_MR: torch.Tensor, other: torch.Tensor) -> None:
        count, padded = shift_MR.shape[1], int(self._chunk["padded_rows"])
        taken = "teacher_shifts" if isinstance(self._problem, Distillation) else "missed"
        self._chunk |= {"shifts": shift_MR.contiguous(), taken: other.contiguous()}
        products = torch.zeros(self._threads, count, self._ends[-1])
        row_terms = torch.zeros(self._threads, *shift_MR.shape)
        of_threads = {
            "query_products": products,
            "row_terms": row_terms,
            "suffix": torch.empty(self._threads, count, self._tile),
            "upstream": torch.empty(self._threads, count, self._tile, dtype=self._dtype),
            "upstream_packed": torch.empty(self._threads, padded, self._tile, dtype=self._dtype),
        }
        self._run("gradients", of_threads)
        self._query_gradient[self._rows] = self._complete(products.sum(0), 0, self._rows, row_terms.sum(0))

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        self._chunk, self._operands, self._scores = {}, {}, torch.empty(0)
        passage_gradient = torch.empty_like(self._inputs[1])
        for index, products in enumerate(self._passage_products):  # all in float32 would be as large as all inputs
            rows = slice(index * self._tile, min((index + 1) * self._tile, self._columns))
            some = products.T[: rows.stop - rows.start]
            passage_gradient[rows] = self._complete(some, 1, rows, self._column_terms_MN[:, rows])
        return self._query_gradient, passage_gradient

    def _complete(self, products: torch.Tensor, side: int, rows: slice, terms: torch.Tensor) -> torch.Tensor:
        """The gradient of some rows of queries (side 0) or passages (1) from their padded products."""
        dims, vectors = self._problem.dims, self._inputs[side]
        gradient = unpad_blocks(products, dims, _STRIP, vectors.shape[1])
        add_norm_terms(gradient, vectors[rows], dims, terms, self._norms[side][:, rows])
        return gradient

    def _run(self, name: str, of_threads: dict[str, torch.Tensor]) -> None:
        """Call a function of the library on every thread, each with its share of the tiles and of `of_threads`."""
        function: Callable[..., None] = getattr(extension(), f"drama_{name}{suffix(self._dtype)}")
        tiles = -(-self._columns // self._tile)

        def share(thread: int) -> None:
            values = self._operands | self._chunk | {key: value[thread] for key, value in of_threads.items()}
            chunk = _Chunk(
                **{key: value.data_ptr() if isinstance(value, torch.Tensor) else value for key, value in values.items()}
            )
            begin, end = (tiles * bound // self._threads for bound in (thread, thread + 1))
            function(ctypes.byref(chunk), ctypes.c_int64(begin), ctypes.c_int64(end))

        list(_pool(self._threads).map(share, range(self._threads)))


def _logsumexp(of_threads: dict[str, torch.Tensor]) -> torch.Tensor:
    """M × R, from each thread's maxima and sums."""
    return (of_threads["maxima"] + of_threads["sums"].log()).logsumexp(0)


def _constant(name: str) -> int:
    compiled = extension()
    assert compiled is not None  # this backend is selected only where there is a library
    return int(getattr(compiled, f"drama_{name}")())


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="drama-tiles")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child has none of the threads


def _strips(vectors: torch.Tensor, lane: int) -> torch.Tensor:
    """Rows × Kp to [rows / 64][Kp / lane][64][lane]."""
    rows, kp = vectors.shape
    return vectors.view(rows // _STRIP, _STRIP, kp // lane, lane).permute(0, 2, 1, 3).contiguous()
