"""Triton: the encoder's epilogue for packed sequences, mean over each sequence's tokens, then unit length.

Covers forward and backward on a GPU; encoder/pooling.py has the same in PyTorch operations.
Shapes: T tokens of all sequences, B sequences, K components, of which the first `dim` are kept.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

BLOCK_T = 8
BLOCK_K = 1024
_FLOOR = tl.constexpr(1e-12)  # of norms, as in torch.nn.functional.normalize


@triton.jit
def forward_kernel(
    hidden_ptr,  # T x K
    boundaries_ptr,  # B + 1
    unit_ptr,  # B x dim
    inverse_ptr,  # B: 1 / |mean|
    stride,
    dim,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program a sequence: the mean of its tokens' first `dim` components, at unit length."""
    sequence = tl.program_id(0)
    begin, end = tl.load(boundaries_ptr + sequence), tl.load(boundaries_ptr + sequence + 1)
    k = tl.arange(0, BLOCK_K)
    total_K = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for first in range(begin, end, BLOCK_T):
        tokens_T = first + tl.arange(0, BLOCK_T)
        hidden_TK = tl.load(
            hidden_ptr + tokens_T.to(tl.int64)[:, None] * stride + k[None, :],
            mask=(tokens_T[:, None] < end) & (k[None, :] < dim),
            other=0.0,
        )
        total_K += tl.sum(hidden_TK.to(tl.float32), 0)
    mean_K = total_K / (end - begin)
    inverse = 1 / tl.maximum(tl.sqrt(tl.sum(mean_K * mean_K, 0)), _FLOOR)
    tl.store(unit_ptr + sequence.to(tl.int64) * dim + k, mean_K * inverse, mask=k < dim)
    tl.store(inverse_ptr + sequence, inverse)


@triton.jit
def backward_kernel(
    hidden_gradient_ptr,  # T x K
    boundaries_ptr,
    unit_ptr,
    inverse_ptr,
    unit_gradient_ptr,  # B x dim
    stride,
    dim,
    BLOCK_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program a sequence: (g − u (u · g)) / (|mean| length) to each of its tokens."""
    sequence = tl.program_id(0)
    begin, end = tl.load(boundaries_ptr + sequence), tl.load(boundaries_ptr + sequence + 1)
    k = tl.arange(0, BLOCK_K)
    unit_K = tl.load(unit_ptr + sequence.to(tl.int64) * dim + k, mask=k < dim, other=0.0)
    upstream_K = tl.load(unit_gradient_ptr + sequence.to(tl.int64) * dim + k, mask=k < dim, other=0.0)
    scale = tl.load(inverse_ptr + sequence) / (end - begin)
    gradient_K = (upstream_K - unit_K * tl.sum(unit_K * upstream_K, 0)) * scale
    for first in range(begin, end, BLOCK_T):
        tokens_T = first + tl.arange(0, BLOCK_T)
        gradient_TK = tl.broadcast_to(gradient_K[None, :], (BLOCK_T, BLOCK_K))
        tl.store(
            hidden_gradient_ptr + tokens_T.to(tl.int64)[:, None] * stride + k[None, :],
            gradient_TK.to(hidden_gradient_ptr.dtype.element_ty),
            mask=(tokens_T[:, None] < end) & (k[None, :] < dim),
        )


class MeanPoolUnit(torch.autograd.Function):
    """hidden T × K and boundaries int32 (B + 1) to unit vectors B × dim, float32."""

    @staticmethod
    def forward(  # type: ignore[override]
        context: Any, hidden_TK: torch.Tensor, boundaries_B1: torch.Tensor, dim: int
    ) -> torch.Tensor:
        hidden_TK = hidden_TK.contiguous()
        count, size = len(boundaries_B1) - 1, hidden_TK.shape[1]
        unit_BD = torch.empty(count, dim, dtype=torch.float32, device=hidden_TK.device)
        inverse_B = torch.empty(count, dtype=torch.float32, device=hidden_TK.device)
        block = triton.next_power_of_2(dim)
        forward_kernel[(count,)](
            hidden_TK, boundaries_B1, unit_BD, inverse_B, size, dim, BLOCK_K=block, BLOCK_T=_tokens(block)
        )
        context.save_for_backward(boundaries_B1, unit_BD, inverse_B)
        context.shape, context.dtype = hidden_TK.shape, hidden_TK.dtype
        return unit_BD

    @staticmethod
    def backward(context: Any, upstream_BD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        boundaries_B1, unit_BD, inverse_B = context.saved_tensors
        gradient_TK = torch.zeros(context.shape, dtype=context.dtype, device=unit_BD.device)
        block = triton.next_power_of_2(unit_BD.shape[1])
        backward_kernel[(len(unit_BD),)](
            gradient_TK,
            boundaries_B1,
            unit_BD,
            inverse_B,
            upstream_BD.contiguous(),
            context.shape[1],
            unit_BD.shape[1],
            BLOCK_K=block,
            BLOCK_T=_tokens(block),
        )
        return gradient_TK, None, None


def _tokens(block_k: int) -> int:
    """Tokens of a tile: as many values as BLOCK_T × BLOCK_K, whatever the width."""
    return max(1, BLOCK_T * BLOCK_K // block_k)


def mean_pool_unit(hidden_TK: torch.Tensor, boundaries_B1: torch.Tensor, dim: int) -> torch.Tensor:
    """Unit vectors B × dim, float32, of packed hidden states; every sequence has a token.

    Differentiable in hidden_TK. Raises ValueError where dim is larger than K.
    """
    if not 1 <= dim <= hidden_TK.shape[1]:
        raise ValueError(f"dim={dim}: the hidden states have {hidden_TK.shape[1]} components")
    pooled: torch.Tensor = MeanPoolUnit.apply(hidden_TK, boundaries_B1, dim)
    return pooled
