"""Attention within packed sequences on the CPU, forward and backward: scores of a few dozen rows at a time.

Covers bidirectional attention of heads of 64 components, as many key-value heads as query heads. Of the forward
pass only the log-sum-exp of each row of scores is kept, as FlashAttention does (Dao et al. 2022, alg. 1; Dao 2023).

bfloat16 or float32; sums and softmax in float32. Shapes: T tokens of S sequences, H heads.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from drama_dist.kernels.native import call, check_elements, library

HEAD = 64  # components


def extension() -> ctypes.CDLL | None:
    """The compiled library; None (with one warning) where it cannot be built."""
    source = Path(__file__).with_name("attention.cpp")
    return library(source, "attention goes on with slower PyTorch operations", openmp=True)


def attend(rows: torch.Tensor, boundaries_S1: torch.Tensor, scaling: float) -> torch.Tensor:
    """Queries, keys and values side by side, T × 3 · H · 64, to T × H · 64.

    boundaries_S1: int32, where each sequence begins, and the end. Raises ValueError where rows are not bfloat16 or
    float32 on the CPU, their width is not of whole heads, or boundaries are not int32 or end elsewhere than the rows.
    """
    check_elements(rows.dtype, rows=rows)
    if rows.shape[1] % (3 * HEAD):
        raise ValueError(f"rows have {rows.shape[1]} components: expected a multiple of 3 · {HEAD}")
    if boundaries_S1.dtype != torch.int32 or int(boundaries_S1[-1]) != len(rows):
        raise ValueError(
            f"boundaries are {boundaries_S1.dtype} up to {boundaries_S1[-1]}: expected int32 to {len(rows)}"
        )
    attended: torch.Tensor = _Attend.apply(rows, boundaries_S1, scaling)
    return attended


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, boundaries: torch.Tensor, scaling: float) -> torch.Tensor:
        rows, boundaries = rows.contiguous(), boundaries.contiguous()
        tokens, width = len(rows), rows.shape[1] // 3
        attended = rows.new_empty(tokens, width)
        normalisers = torch.empty(width // HEAD, tokens, dtype=torch.float32)
        _call("attend", rows, boundaries, scaling, attended, normalisers)
        ctx.save_for_backward(rows, boundaries, attended, normalisers)
        ctx.scaling = scaling
        return attended

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, boundaries, attended, normalisers = ctx.saved_tensors
        gradient = torch.empty_like(rows)
        saved = attended, normalisers
        _call("attend_backward", rows, boundaries, ctx.scaling, *saved, upstream.contiguous(), gradient)
        return gradient, None, None


def _call(name: str, rows: torch.Tensor, boundaries: torch.Tensor, scaling: float, *tensors: torch.Tensor) -> None:
    heads = rows.shape[1] // 3 // HEAD
    call(extension(), name, rows.dtype, len(boundaries) - 1, boundaries, heads, float(scaling), rows, *tensors)
