"""Tiles on a GPU: the Triton kernels' launchers, and their tile shapes.

Covers padding, launching, autotuning (the choice is cached on disk), and splitting components into
segments. One chunk holds all rows: the kernels keep no scores. float32, bfloat16 and float16 inputs.
Shapes: B queries, N passages, K components, M dims; R and C padded rows, T the teacher's components.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch.nn.functional import normalize, pad

from drama_dist.kernels import info_nce_backward, info_nce_forward
from drama_dist.kernels.problem import Problem
from drama_dist.kernels.tiles import MASKED, ChunkScores, Gradients, Norms, block_ends, pad_blocks, unpad_blocks

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_ROWS = 32 if INTERPRETED else 64  # every shape's rows and columns divide it
_COMPONENTS = 16 if INTERPRETED else 64  # every shape's components divide it
_PROGRAMS = 264  # two for each multiprocessor of an H100: fewer row blocks share out the columns too


@dataclass(frozen=True)
class Shape:
    """A program's tile: rows × columns of scores, components at a time."""

    rows: int
    columns: int
    components: int
    warps: int
    stages: int


@dataclass(frozen=True)
class _Shapes:
    """Of every kernel. segment: components of one program of the separate form."""

    forward: tuple[Shape, ...]
    separate: tuple[Shape, ...]
    shared: tuple[Shape, ...]
    segment: int


# As large as the registers of the oldest chip allow without spills; see ahead_of_time.py.
_SHAPES = {
    ("cuda", "half"): _Shapes(
        forward=(Shape(64, 64, 64, 8, 3), Shape(64, 32, 32, 8, 3)),
        separate=(Shape(64, 64, 32, 8, 2),),
        shared=(Shape(64, 64, 32, 8, 2), Shape(64, 32, 32, 8, 2)),
        segment=256,
    ),
    ("cuda", "float32"): _Shapes(
        forward=(Shape(64, 32, 32, 8, 2),),
        separate=(Shape(32, 32, 16, 8, 2),),
        shared=(Shape(32, 32, 16, 4, 2),),
        segment=64,
    ),
    ("hip", "half"): _Shapes(
        forward=(Shape(64, 64, 64, 8, 3), Shape(64, 32, 32, 4, 3)),
        separate=(Shape(64, 32, 64, 4, 2),),
        shared=(Shape(32, 32, 64, 4, 2), Shape(32, 32, 32, 8, 2)),
        segment=64,
    ),
    ("hip", "float32"): _Shapes(
        forward=(Shape(64, 32, 32, 8, 2),),
        separate=(Shape(32, 32, 32, 4, 2),),
        shared=(Shape(64, 32, 16, 8, 2),),
        segment=64,
    ),
}
_ONE = (Shape(32, 32, 16, 1, 1),)


def shapes(float32: bool, hip: bool) -> _Shapes:
    """What autotuning chooses from, for inputs in float32 or in half precision."""
    if INTERPRETED:
        return _Shapes(_ONE, _ONE, _ONE, 16)
    return _SHAPES["hip" if hip else "cuda", "float32" if float32 else "half"]


def precision_of_products(hip: bool) -> str:
    """How float32 inputs are multiplied: three TF32 products on NVIDIA, which err as float32 does; plain on AMD."""
    return "ieee" if hip or INTERPRETED else "tf32x3"


@dataclass(frozen=True)
class _Side:
    """Queries or passages, padded to whole tiles with zeros. teacher: its unit vectors, or one unused number."""

    count: int
    vectors_RK: torch.Tensor
    norms_MR: torch.Tensor
    teacher_RT: torch.Tensor


class TritonTiles:
    """See Tiles. Backward in the separate form: the same to the bit, whenever it is run."""

    def __init__(self, queries_BK: torch.Tensor, passages_NK: torch.Tensor, temperature: float, problem: Problem):
        check_dtypes(queries_BK, passages_NK)
        self._problem, self._inputs = problem, (queries_BK, passages_NK)
        self._float32 = queries_BK.dtype == torch.float32
        self._norms = Norms(queries_BK, passages_NK, temperature, problem.dims)
        self._ends = block_ends(problem.dims, _COMPONENTS)
        self._exponent = 1 + problem.hardness * temperature
        teachers = _unit_teachers(problem, queries_BK.dtype)
        self._queries = self._side(queries_BK, self._norms.scaled_query_MB, teachers[0])
        self._passages = self._side(passages_NK, self._norms.passage_MN, teachers[1])
        self._shared_inputs = {
            "exponent": self._exponent,
            "bounds_ptr": torch.tensor([0, *self._ends], dtype=torch.int32, device=queries_BK.device),
            "dims": len(problem.dims),
            **_mask_inputs(problem, teachers, len(passages_NK)),
            "HAS_TEACHER": problem.teacher is not None,
            "PRECISION": precision_of_products(_on_hip()),
        }
        self._gradients: Gradients | None = None

    def row_chunks(self) -> Iterator[slice]:
        yield slice(0, self._queries.count)

    def scores(self, rows: slice) -> ChunkScores:
        rivals_MB, most_MB, own_MB, left_out = self._forward_pass(transposed=False)
        return ChunkScores(own_MB, rivals_MB, best_score(most_MB[-1], self._exponent), left_out)

    def fold_columns(self) -> None:
        """Nothing to add: the transposed pass forms every column's normaliser at once."""

    def column_normalisers(self) -> torch.Tensor:
        return self._forward_pass(transposed=True)[0]

    def add_gradients(
        self, shift_MR: torch.Tensor, missed_MR: torch.Tensor, column_shift_MN: torch.Tensor | None
    ) -> None:
        shifts = _to_tiles(shift_MR, math.inf)
        given = {
            "symmetric": self._problem.symmetric,
            "scales_ptr": self._norms.query_MB.new_tensor(self._problem.weights),
            "shifts_ptr": shifts,
            "missed_ptr": _to_tiles(missed_MR, 0),
            "column_shifts_ptr": shifts if column_shift_MN is None else _to_tiles(column_shift_MN, math.inf),
            "HAS_SYMMETRIC": column_shift_MN is not None,
        }
        sums = self._backward_pass(given)
        count = self._queries.count
        for sum_of_rows in sums:
            sum_of_rows /= count  # last: weights alone stay in range of float16
        (query, passage), width = sums[:2], self._inputs[0].shape[1]
        unpadded = [
            unpad_blocks(side[:rows], self._problem.dims, _COMPONENTS, width)
            for side, rows in ((query, count), (passage, self._passages.count))
        ]
        terms = sums[2][:, :count], sums[3][:, : self._passages.count]
        self._gradients = self._norms.complete(self._inputs, (unpadded[0], unpadded[1]), *terms)

    def gradients(self) -> Gradients:
        assert self._gradients is not None
        return self._gradients

    def _side(self, vectors: torch.Tensor, norms: torch.Tensor, teacher: torch.Tensor) -> _Side:
        padded = _rows_to_tiles(pad_blocks(vectors, self._problem.dims, _COMPONENTS))
        return _Side(len(vectors), padded, _to_tiles(norms, 0), teacher)

    def _kernel(self, name: str) -> Any:
        return _tuned(name, self._float32)

    def _sides(self, transposed: bool) -> dict[str, Any]:
        x, y = (self._passages, self._queries) if transposed else (self._queries, self._passages)
        return {
            "x_ptr": x.vectors_RK,
            "y_ptr": y.vectors_RK,
            "row_count": x.count,
            "column_count": y.count,
            "padded_rows": len(x.vectors_RK),
            "padded_columns": len(y.vectors_RK),
            "x_stride": x.vectors_RK.stride(0),
            "y_stride": y.vectors_RK.stride(0),
            "x_norms_ptr": x.norms_MR,
            "y_norms_ptr": y.norms_MR,
            "teacher_x_ptr": x.teacher_RT,
            "teacher_y_ptr": y.teacher_RT,
            "teacher_size": x.teacher_RT.shape[1],
            **self._shared_inputs,
        }

    def _forward_pass(self, transposed: bool) -> tuple[torch.Tensor, ...]:
        """Of every row of the owner's side: logsumexp, maximum, own score; and the pairs left out."""
        sides, dims = self._sides(transposed), len(self._problem.dims)
        rows, columns = sides["padded_rows"], sides["padded_columns"]
        splits = max(1, min(_PROGRAMS // triton.cdiv(rows, _ROWS), triton.cdiv(columns, 1024)))
        per_split = triton.cdiv(triton.cdiv(columns, splits), _ROWS) * _ROWS
        splits = triton.cdiv(columns, per_split)
        maxima, sums, own = self._norms.query_MB.new_empty(3, splits, dims, rows)
        left_out = torch.empty(splits, rows, dtype=torch.int32, device=own.device)
        self._kernel("forward")[lambda meta: (triton.cdiv(rows, meta["BLOCK_R"]), splits)](
            **sides,
            maxima_ptr=maxima,
            sums_ptr=sums,
            own_ptr=own,
            left_out_ptr=left_out,
            columns_per_split=per_split,
            MP=triton.next_power_of_2(dims),
            TRANSPOSED=transposed,
        )
        normalisers = (maxima + sums.log()).logsumexp(0)
        of_rows = [values[:, : sides["row_count"]] for values in (normalisers, maxima.amax(0), own.sum(0))]
        return (*of_rows, left_out.sum() // dims)

    def _backward_pass(self, given: dict[str, Any]) -> list[torch.Tensor]:
        """Products with the queries' and the passages' gradients, then the terms of rows and columns, padded."""
        dims, segment = len(self._problem.dims), shapes(self._float32, _on_hip()).segment
        segments = _segments(self._ends, segment)
        products, terms = [], []
        for transposed in (False, True):
            sides = self._sides(transposed)
            rows = sides["padded_rows"]
            products.append(torch.empty_like(sides["x_ptr"], dtype=torch.float32))
            terms.append(products[-1].new_empty(dims, rows))
            self._kernel("separate")[lambda meta, rows=rows: (triton.cdiv(rows, meta["BLOCK_R"]), len(segments))](
                **sides,
                **given,
                segments_ptr=torch.tensor(segments, dtype=torch.int32, device=products[-1].device),
                gradient_ptr=products[-1],
                terms_ptr=terms[-1],
                MP=triton.next_power_of_2(dims),
                TRANSPOSED=transposed,
                SEGMENT=segment,
            )
        return [*products, *terms]


class SharedTritonTiles(TritonTiles):
    """See Tiles. Backward in the shared form: half the products; sums in the machine's order."""

    def _backward_pass(self, given: dict[str, Any]) -> list[torch.Tensor]:
        sides = self._sides(transposed=False)
        rows, columns = sides["padded_rows"], sides["padded_columns"]
        products = [torch.zeros_like(sides[side], dtype=torch.float32) for side in ("x_ptr", "y_ptr")]
        terms = [torch.zeros_like(sides[norms]) for norms in ("x_norms_ptr", "y_norms_ptr")]
        del sides["bounds_ptr"], sides["dims"]
        self._kernel("shared")[
            lambda meta: (triton.cdiv(rows, meta["BLOCK_R"]), triton.cdiv(columns, meta["BLOCK_C"]))
        ](
            **sides,
            **given,
            x_gradient_ptr=products[0],
            y_gradient_ptr=products[1],
            x_terms_ptr=terms[0],
            y_terms_ptr=terms[1],
            ENDS=tuple(self._ends),
        )
        return [*products, *terms]


def best_score(most_R: torch.Tensor, exponent: float) -> torch.Tensor:
    """Of each row's largest exponent z; a row without negatives stays near MASKED."""
    return torch.where(most_R > MASKED / 10, most_R / exponent, most_R)


def check_dtypes(queries_BK: torch.Tensor, passages_NK: torch.Tensor) -> None:
    """Raises ValueError where the kernels do not take the inputs' precision."""
    if queries_BK.dtype != passages_NK.dtype or queries_BK.dtype == torch.float64:
        raise ValueError(
            f"the triton backends take float32, bfloat16 or float16 on both sides, "
            f"got {queries_BK.dtype} and {passages_NK.dtype}"
        )


def _on_hip() -> bool:
    return torch.version.hip is not None


@cache
def _tuned(kernel: str, float32: bool) -> Any:
    function, added_to = {
        "forward": (info_nce_forward.forward_kernel, []),
        "separate": (info_nce_backward.separate_kernel, []),
        "shared": (
            info_nce_backward.shared_kernel,
            ["x_gradient_ptr", "y_gradient_ptr", "x_terms_ptr", "y_terms_ptr"],
        ),
    }[kernel]
    configs = [
        triton.Config(
            {"BLOCK_R": shape.rows, "BLOCK_C": shape.columns, "BLOCK_K": shape.components},
            num_warps=shape.warps,
            num_stages=shape.stages,
        )
        for shape in getattr(shapes(float32, _on_hip()), kernel)
    ]
    key = [name for name in ("padded_rows", "padded_columns", "x_stride", "HAS_TEACHER") if name in function.arg_names]
    return triton.autotune(configs, key=key, reset_to_zero=added_to, cache_results=True)(function)


def _to_tiles(values: torch.Tensor, filler: float) -> torch.Tensor:
    """... × R to ... × whole tiles."""
    return pad(values, (0, -values.shape[-1] % _ROWS), value=filler).contiguous()


def _rows_to_tiles(values: torch.Tensor, filler: float = 0) -> torch.Tensor:
    return pad(values, (0, 0, 0, -len(values) % _ROWS), value=filler).contiguous()


def _unit_teachers(problem: Problem, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's unit vectors of queries and passages, padded to whole tiles, in the inputs' precision."""
    if problem.teacher is None:
        nothing = torch.zeros(1, 1, device=problem.positives_B.device)
        return nothing, nothing
    padded = []
    for side in (problem.teacher.queries, problem.teacher.passages):
        unit = normalize(side.float(), dim=1).to(dtype)
        padded.append(_rows_to_tiles(pad(unit, (0, -unit.shape[1] % _COMPONENTS))))
    return padded[0], padded[1]


def _mask_inputs(problem: Problem, teachers: tuple[torch.Tensor, torch.Tensor], passages: int) -> dict[str, Any]:
    """Positives, documents and limits of queries; without ids every passage is a document of its own.

    int32, half the registers of int64: documents go by the order of their ids.
    """
    positives, own_ids = problem.positives_B, problem.positive_ids()
    if problem.passage_ids_N is None or own_ids is None:
        ids, own_ids, excluded = torch.arange(passages, dtype=torch.int32, device=positives.device), positives, None
    else:
        ids, own_ids, excluded = ranked(problem.passage_ids_N, own_ids, problem.excluded_ids_BE)
    limits = torch.full(positives.shape, math.inf, device=positives.device)
    if problem.teacher is not None:
        limits = (teachers[0][: len(positives)].float() * teachers[1][positives].float()).sum(
            1
        ) - problem.teacher.margin
    return {
        "positives_ptr": _to_tiles(positives.int(), -1),
        "passage_ids_ptr": _to_tiles(ids, -1),
        "own_ids_ptr": _to_tiles(own_ids.int(), -1),
        "excluded_ptr": ids if excluded is None else _rows_to_tiles(excluded, -1),
        "excluded_count": 0 if excluded is None else excluded.shape[1],
        "teacher_limits_ptr": _to_tiles(limits, math.inf),
    }


def ranked(
    ids_N: torch.Tensor, own_ids_B: torch.Tensor, excluded_BE: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Ids by their order among all that occur, int32: equal where they were equal."""
    excluded = ids_N.new_empty(len(own_ids_B), 0) if excluded_BE is None else excluded_BE
    ranks = torch.cat([ids_N, own_ids_B, excluded.flatten()]).unique(return_inverse=True)[1].int()
    ids, own, rest = ranks.split([len(ids_N), len(own_ids_B), excluded.numel()])
    return ids, own, None if excluded_BE is None else rest.view(excluded.shape)


def _segments(ends: list[int], width: int) -> list[tuple[int, int, int]]:
    """(first component, end, place of the smallest dim that includes them), at most `width` components."""
    found: list[tuple[int, int, int]] = []
    for place, (begin, end) in enumerate(zip((0, *ends), ends, strict=False)):
        found.extend((first, min(first + width, end), place) for first in range(begin, end, width))
    return found
