"""Tiles compiled for this CPU from tiles.cpp: scores, masks, exponentials and products in cache, in one pass.

Covers the library's operands, their layout, and threads. bfloat16 operands where the
inputs are bfloat16, float32 else; sums are float32 always. For a given number of threads the result is
the same to the bit.
Shapes: B queries, N passages, K components, M dims, R rows of a chunk; Kp and Np padded.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
from torch.nn.functional import pad

from drama_dist.kernels.libraries import library, suffix
from drama_dist.kernels.problem import Problem
from drama_dist.kernels.tiles import (
    ChunkScores,
    Gradients,
    Norms,
    add_norm_terms,
    block_ends,
    pad_blocks,
    row_chunks,
    unpad_blocks,
)

_STRIP = 64
_SCORE_BYTES = 1 << 27
_MOST_ROWS = 576
_DEPTH_STEP = 32  # the largest of any build
_ROW_STEP = 96  # whole register tiles of 6 rows or of 16, and whole steps of a product's depth
_INTEGERS = ("rows", "padded_rows", "columns", "components", "dims")
_FLOATS = ("exponent", "symmetric")
_ORDER = (  # as in tiles.cpp
    *_INTEGERS,
    "ends",
    *_FLOATS,
    "queries",
    "queries_transposed",
    "passages_by_depth",
    "passages_by_column",
    "query_norms",
    "passage_norms",
    "masked",
    "positives",
    "scores",
    "own",
    "maxima",
    "sums",
    "column_maxima",
    "column_sums",
    "scales",
    "shifts",
    "missed",
    "column_shifts",
    "row_terms",
    "column_terms",
    "query_products",
    "passage_products",
    "suffix",
    "upstream",
    "upstream_packed",
)


class _Chunk(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64 if name in _INTEGERS else ctypes.c_float if name in _FLOATS else ctypes.c_void_p)
        for name in _ORDER
    ]


def extension() -> ctypes.CDLL | None:
    """The compiled loss kernels; None (with one warning) where they cannot be built."""
    return library("tiles", "the loss goes on with slower PyTorch operations")


def chunk_rows(rows: int, columns: int, dims: Sequence[int]) -> list[int]:
    """How many rows each chunk has; columns: of the largest part."""
    return [
        len(range(rows)[part]) for part in row_chunks(rows, columns, len(dims), _SCORE_BYTES, _MOST_ROWS, _ROW_STEP)
    ]


def held_bytes(rows: int, columns: int, dims: Sequence[int], threads: int) -> int:
    """What a call holds at most beside its float32 inputs, masks of one document included."""
    tile = 2 * _STRIP
    padded, width = -(-columns // tile) * tile, block_ends(dims, _STRIP)[-1]
    count = -(-chunk_rows(rows, columns, dims)[0] // _DEPTH_STEP) * _DEPTH_STEP
    passages = (4 if columns % tile else 3) * padded * width  # padded, in both layouts, and products
    norms = 4 * len(dims) * padded
    scratch = threads * count * (width + 3 * tile) + count * width
    return 4 * (passages + norms + len(dims) * count * padded + scratch + rows * width) + 2 * count * columns


class CompiledTiles:
    """See Tiles."""

    def __init__(self, queries_BK: torch.Tensor, passages_NK: torch.Tensor, temperature: float, problem: Problem):
        both = {queries_BK.dtype, passages_NK.dtype}
        self._dtype = torch.bfloat16 if both == {torch.bfloat16} else torch.float32
        self._inputs = queries_BK, passages_NK
        self._problem, self._columns = problem, len(passages_NK)
        self._norms = Norms(queries_BK, passages_NK, temperature, problem.dims)
        self._tile = _number("tile_columns")
        self._depth_step = _number(f"depth_step{suffix(self._dtype)}")
        self._threads = torch.get_num_threads()
        self._ends = block_ends(problem.dims, _STRIP)
        self._queries = pad_blocks(queries_BK.to(self._dtype), problem.dims, _STRIP)
        self._state: dict[str, torch.Tensor | float] = self._whole_call(temperature)
        self._chunk: dict[str, torch.Tensor | float] = {}
        self._rows = slice(0)
        self._row_terms_MB = torch.zeros_like(self._norms.query_MB)
        self._query_gradient = torch.empty_like(queries_BK)
        self._scores = torch.empty(0)

    def _whole_call(self, temperature: float) -> dict[str, torch.Tensor | float]:
        problem, tile = self._problem, self._tile
        tiles = -(-self._columns // tile)
        passages = pad_blocks(self._inputs[1].to(self._dtype), problem.dims, _STRIP)
        extra = tiles * tile - self._columns
        passages = pad(passages, (0, 0, 0, extra)) if extra else passages  # pad copies in any case
        lane = 2 if self._dtype == torch.bfloat16 else 1
        kp = self._ends[-1]
        norms_MN = pad(self._norms.passage_MN, (0, extra))
        count = len(self._inputs[0])
        return {
            "columns": self._columns,
            "components": kp,
            "dims": len(problem.dims),
            "ends": torch.tensor(self._ends),
            "exponent": 1 + problem.hardness * temperature,
            "symmetric": problem.symmetric,
            "passages_by_depth": _strips(passages, lane),
            "passages_by_column": passages.view(tiles, tile // lane, lane, kp // _STRIP, _STRIP)
            .permute(0, 3, 1, 4, 2)
            .contiguous(),
            "passage_norms": norms_MN.contiguous(),
            "column_maxima": torch.full_like(norms_MN, -torch.inf),
            "column_sums": torch.zeros_like(norms_MN),
            "scales": torch.tensor([weight / count for weight in problem.weights], dtype=torch.float32),
            "column_terms": torch.zeros_like(norms_MN),
            "passage_products": torch.zeros(tiles, kp, tile),
        }

    def row_chunks(self) -> Iterator[slice]:
        rows, dims = len(self._inputs[0]), len(self._problem.dims)
        most = self._problem.most_columns(self._columns)
        return row_chunks(rows, most, dims, _SCORE_BYTES, _MOST_ROWS, _ROW_STEP)

    def scores(self, rows: slice) -> ChunkScores:
        masked_RN = self._problem.masked(rows, self._columns)
        self._rows = rows
        dims, count = len(self._problem.dims), rows.stop - rows.start
        padded = -(-count // self._depth_step) * self._depth_step
        tiles = -(-self._columns // self._tile)
        if self._scores.numel() < dims * tiles * count * self._tile:
            self._scores = torch.empty(dims * tiles * count * self._tile)
        self._chunk = {
            "rows": count,
            "padded_rows": padded,
            "queries": self._queries[rows],
            "queries_transposed": pad(self._queries[rows].T, (0, padded - count)).contiguous(),
            "query_norms": self._norms.scaled_query_MB[:, rows].contiguous(),
            "positives": self._problem.positives_B[rows].contiguous(),
            "scores": self._scores,
            "own": torch.zeros(dims, count),
        }
        if masked_RN is not None:
            self._chunk["masked"] = masked_RN.contiguous()
        maxima = torch.full((self._threads, dims, count), -torch.inf)
        sums = torch.zeros_like(maxima)
        suffix = torch.empty(self._threads, count, self._tile)
        self._run("scores", True, {"maxima": maxima, "sums": sums, "suffix": suffix})
        own = self._chunk["own"]
        assert isinstance(own, torch.Tensor)
        best_R = maxima[:, -1].amax(0) / float(self._state["exponent"])
        masked_pairs = torch.zeros((), dtype=torch.int64) if masked_RN is None else masked_RN.sum()
        return ChunkScores(own, (maxima + sums.log()).logsumexp(0), best_R, masked_pairs)

    def fold_columns(self) -> None:
        self._run("fold_columns", False, {})

    def column_normalisers(self) -> torch.Tensor:
        maxima, sums = self._state["column_maxima"], self._state["column_sums"]
        assert isinstance(maxima, torch.Tensor) and isinstance(sums, torch.Tensor)
        return (maxima + sums.log())[:, : self._columns]

    def add_gradients(
        self, shift_MR: torch.Tensor, missed_MR: torch.Tensor, column_shift_MN: torch.Tensor | None
    ) -> None:
        count, padded = int(self._chunk["rows"]), int(self._chunk["padded_rows"])
        self._chunk |= {"shifts": shift_MR.contiguous(), "missed": missed_MR.contiguous()}
        if column_shift_MN is not None:
            columns = self._state["passage_norms"]
            assert isinstance(columns, torch.Tensor)
            extra = columns.shape[1] - self._columns
            self._chunk["column_shifts"] = pad(column_shift_MN, (0, extra), value=torch.inf).contiguous()
        products = torch.zeros(self._threads, count, self._ends[-1])
        row_terms = torch.zeros(self._threads, *shift_MR.shape)
        own_scratch = {
            "query_products": products,
            "row_terms": row_terms,
            "suffix": torch.empty(self._threads, count, self._tile),
            "upstream": torch.empty(self._threads, count, self._tile, dtype=self._dtype),
            "upstream_packed": torch.empty(self._threads, padded, self._tile, dtype=self._dtype),
        }
        self._run("gradients", True, own_scratch)
        terms_MR = self._row_terms_MB[:, self._rows] = row_terms.sum(0)
        self._query_gradient[self._rows] = self._complete(products.sum(0), 0, self._rows, terms_MR)

    def gradients(self) -> Gradients:
        products, terms_MN = self._state["passage_products"], self._state["column_terms"]
        assert isinstance(products, torch.Tensor) and isinstance(terms_MN, torch.Tensor)
        self._chunk, self._scores = {}, torch.empty(0)
        del self._state["passages_by_depth"], self._state["passages_by_column"]
        passage_gradient = torch.empty_like(self._inputs[1])
        for place, of_tile in enumerate(products):  # a float32 copy of all would be as large as all inputs
            rows = slice(place * self._tile, min((place + 1) * self._tile, self._columns))
            some = of_tile.T[: rows.stop - rows.start]
            passage_gradient[rows] = self._complete(some, 1, rows, terms_MN[:, rows])
        temperature = -self._row_terms_MB.sum() / self._norms.temperature
        return Gradients(self._query_gradient, passage_gradient, temperature)

    def _complete(self, products: torch.Tensor, side: int, rows: slice, terms: torch.Tensor) -> torch.Tensor:
        """The gradient of some rows of queries (side 0) or passages (1) from their padded products."""
        dims, vectors = self._problem.dims, self._inputs[side]
        gradient = unpad_blocks(products, dims, _STRIP, vectors.shape[1])
        norms = (self._norms.query_MB, self._norms.passage_MN)[side]
        add_norm_terms(gradient, vectors[rows], dims, terms, norms[:, rows])
        return gradient

    def _run(self, name: str, typed: bool, of_thread: dict[str, torch.Tensor]) -> None:
        """Call a function of the library on every thread, each with its share of the tiles and of `of_thread`."""
        function: Callable[..., None] = getattr(extension(), f"drama_{name}{suffix(self._dtype) if typed else ''}")
        tiles = -(-self._columns // self._tile)

        def share(thread: int) -> None:
            values = self._state | self._chunk | {key: value[thread] for key, value in of_thread.items()}
            chunk = _Chunk(
                **{key: value.data_ptr() if isinstance(value, torch.Tensor) else value for key, value in values.items()}
            )
            begin, end = (tiles * place // self._threads for place in (thread, thread + 1))
            function(ctypes.byref(chunk), ctypes.c_int64(begin), ctypes.c_int64(end))

        list(_pool(self._threads).map(share, range(self._threads)))


def _number(name: str) -> int:
    compiled = extension()
    assert compiled is not None  # info_nce chooses this backend only where there is a library
    return int(getattr(compiled, f"drama_{name}")())


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="drama-tiles")


def _strips(vectors: torch.Tensor, lane: int) -> torch.Tensor:
    """Rows × Kp to [rows / 64][Kp / lane][64][lane]."""
    rows, kp = vectors.shape
    return vectors.view(rows // _STRIP, _STRIP, kp // lane, lane).permute(0, 2, 1, 3).contiguous()
