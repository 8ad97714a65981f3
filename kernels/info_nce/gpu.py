"""What both forms of the loss on a GPU share: operands, norms, documents, and the gradients' last steps.

Shapes: B queries, N passages, K components, M dims, R rows of a chunk, E excluded documents of a query.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton

from drama_dist.kernels.info_nce import norm_kernels
from drama_dist.kernels.info_nce.problem import Contrast, Distillation, Problem
from drama_dist.kernels.info_nce.tiles import FLOOR

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_ALIGNMENT = 16  # of a product's rows, in elements


class Vectors:
    """Queries and passages of one call, and the gradients that come of them.

    Float32 vectors are rounded to bfloat16 where the problem lets that be; gradients are of the given precision.
    """

    def __init__(
        self,
        queries_BK: torch.Tensor,
        passages_NK: torch.Tensor,
        problem: Problem,
        scale: float,
        nothing: float = 0.0,
        pad: int = 1,
    ):
        """scale: of the queries' inverse norms; nothing: what a vector without length has for one; pad: norms are
        padded with it to a multiple of so many rows.
        """
        self.dtype = queries_BK.dtype
        sides = queries_BK, passages_NK
        if problem.rounded and self.dtype == torch.float32:
            sides = queries_BK.bfloat16(), passages_NK.bfloat16()
        self.sides = tuple(side if side.stride(1) == 1 else side.contiguous() for side in sides)
        self.dims = problem.dims
        begins = (0, *self.dims[:-1])
        self.blocks = [slice(*ends) for ends in zip(begins, self.dims, strict=True)]
        self._block_k = triton.next_power_of_2(max(block.stop - block.start for block in self.blocks))
        self._scales, self._nothing, self._pad = (scale, 1.0), nothing, pad
        self.norms = tuple(self._inverse_norms(*each) for each in zip(self.sides, self._scales, strict=True))
        self.terms = tuple(torch.empty_like(norms) for norms in self.norms)
        self.products: tuple[torch.Tensor, ...] = ()  # none, where nothing is learned

    def add_products(self, rows: slice, upstream_MRN: torch.Tensor) -> None:
        """Multiply dL/dA of a chunk, summed over the dims that include a block, with both sides' blocks.

        Chunks come in order: the first begins the passages' sums.
        """
        queries, passages = self.sides
        if not self.products:
            self.products = tuple(torch.empty_like(side, dtype=torch.float32) for side in self.sides)
        for upstream_RN, block in zip(upstream_MRN, self.blocks, strict=True):
            multiply(upstream_RN, passages[:, block], self.products[0][rows, block])
            of_passages = self.products[1][:, block]
            multiply(upstream_RN.T, queries[rows, block], of_passages, add=rows.start > 0)

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of both sides, from the products and terms."""
        return self._finished(0), self._finished(1)

    def _inverse_norms(self, vectors_RK: torch.Tensor, scale: float) -> torch.Tensor:
        """M × R, padded."""
        rows = len(vectors_RK)
        padded = triton.cdiv(rows, self._pad) * self._pad
        norms_MR = torch.empty(len(self.dims), padded, dtype=torch.float32, device=vectors_RK.device)
        norm_kernels.norms_kernel[(padded,)](
            vectors_RK,
            vectors_RK.stride(0),
            norms_MR,
            rows,
            padded,
            scale,
            FLOOR,
            self._nothing,
            DIMS=self.dims,
            BLOCK_K=self._block_k,
        )
        return norms_MR

    def _finished(self, side: int) -> torch.Tensor:
        vectors_RK = self.sides[side]
        gradient_RK = torch.empty_like(self.products[side], dtype=self.dtype)
        rows, width = gradient_RK.shape
        norm_kernels.finish_kernel[(rows,)](
            self.products[side],
            vectors_RK,
            vectors_RK.stride(0),
            self.terms[side],
            self.norms[side],
            self.norms[side].stride(0),
            gradient_RK,
            width,
            self._scales[side],
            self._nothing,
            1 / len(self.sides[0]),
            DIMS=self.dims,
            BLOCK_K=self._block_k,
        )
        return gradient_RK


def documents(problem: Contrast) -> dict[str, torch.Tensor]:
    """`positives` and `positive ids`; with ids `passages` and perhaps `excluded`.

    All int32, half the registers of int64: ids by their order. Without ids columns are ids.
    """
    positives, positive_ids = problem.positives_B.int(), problem.positive_ids()
    if problem.passage_ids_N is None or positive_ids is None:
        return {"positives": positives, "positive ids": positives}
    return {"positives": positives, **_ranked(problem.passage_ids_N, positive_ids, problem.excluded_ids_BE)}


def _ranked(
    passage_ids_N: torch.Tensor, positive_ids_B: torch.Tensor, excluded_BE: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Ids by their order among all that occur, int32: equal where they were equal."""
    excluded = passage_ids_N.new_empty(len(positive_ids_B), 0) if excluded_BE is None else excluded_BE
    every_id = torch.cat([passage_ids_N, positive_ids_B, excluded.flatten()])
    ranks = every_id.unique(return_inverse=True)[1].int()
    passages, positives, rest = ranks.split([len(passage_ids_N), len(positive_ids_B), excluded.numel()])
    ranked = {"passages": passages, "positive ids": positives}
    return ranked if excluded_BE is None else ranked | {"excluded": rest.view(excluded.shape)}


def logits_buffer(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """For a teacher's logits of a chunk: float32, rows in whole steps."""
    return torch.empty(rows, columns + -columns % _ALIGNMENT, dtype=torch.float32, device=device)


def write_logits(problem: Distillation, rows: slice, logits_RN: torch.Tensor) -> None:
    """The teacher's logits of a chunk."""
    teacher = problem.teacher
    multiply(teacher.queries_BT[rows], teacher.passages_NT.T, logits_RN)
    if teacher.sparse is not None:
        teacher.sparse.of_rows(rows).add_to(logits_RN)


def shares(length: int, blocks: int, step: int, programs: int) -> tuple[int, int]:
    """Into how many shares, of how many elements in whole steps, a length is cut, so that all processors have work."""
    count = max(1, min(programs // blocks, triton.cdiv(length, 4 * step)))
    each = triton.cdiv(triton.cdiv(length, count), step) * step
    return triton.cdiv(length, each), each


def multiply(left: torch.Tensor, right: torch.Tensor, result: torch.Tensor, add: bool = False) -> None:
    """Write left @ right to `result` (float32), or add it to what is there; operands of any precision."""
    wanted: dict[str, Any] = {"out_dtype": torch.float32}
    if left.dtype == torch.float32 or not left.is_cuda or torch.version.hip:  # no half precision that gives float32
        left, right, wanted = left.float(), right.float(), {}
    if add:
        torch.addmm(result, left, right, **wanted, out=result)
    else:
        torch.mm(left, right, **wanted, out=result)
