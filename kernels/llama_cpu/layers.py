"""A transformer layer on the CPU with everything between its matrix products fused: layers.cpp.

Covers the projections to heads (RMSNorm, rotary positions) and the feed-forward part (RMSNorm, SwiGLU, residual),
with gradients. What a pass over memory can give again is not kept for the backward pass: inputs, projections, gate
and up are. Attention is in attention.py; knows no model.

bfloat16 or float32, arithmetic in float32, rounded once. Weights are out × in, as in nn.Linear. Shapes: T tokens,
K components, heads of D components, I inner components.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from drama_dist.kernels.native import call, check_elements, library

_WIDTH = 16  # components of the widest vector in layers.cpp


def extension() -> ctypes.CDLL | None:
    """The compiled library; None (with one warning) where it cannot be built."""
    source = Path(__file__).with_name("layers.cpp")
    return library(source, "transformer layers go on with slower PyTorch operations", openmp=True)


def fits(hidden: int, inner: int, head: int) -> bool:
    """Whether layers.cpp takes these widths."""
    return hidden % _WIDTH == 0 and inner % _WIDTH == 0 and head % (2 * _WIDTH) == 0


def project(
    x_TK: torch.Tensor,
    norm_K: torch.Tensor,
    epsilon: float,
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    rotary_TD: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Queries, keys and values of all heads side by side, T × all their components, after RMSNorm.

    weights: of queries, keys and values; queries and keys are rotated by rotary_TD, cosines and sines.
    Raises ValueError where dtypes differ, or are not bfloat16 or float32 on the CPU.
    """
    names = ("x", "norm", "query weights", "key weights", "value weights", "cosines", "sines")
    check_elements(x_TK.dtype, **dict(zip(names, (x_TK, norm_K, *weights, *rotary_TD), strict=True)))
    projected: torch.Tensor = _Project.apply(x_TK, norm_K, float(epsilon), *weights, *rotary_TD)
    return projected


def feed_forward(
    x_TK: torch.Tensor,
    norm_K: torch.Tensor,
    epsilon: float,
    gate_IK: torch.Tensor,
    up_IK: torch.Tensor,
    down_KI: torch.Tensor,
) -> torch.Tensor:
    """x + down(silu(gate(n)) · up(n)), n = RMSNorm(x); T × K (Shazeer 2020, eq. 6; Zhang and Sennrich 2019, eq. 4).

    Raises ValueError where dtypes differ, or are not bfloat16 or float32 on the CPU.
    """
    check_elements(x_TK.dtype, x=x_TK, norm=norm_K, gate=gate_IK, up=up_IK, down=down_KI)
    result: torch.Tensor = _FeedForward.apply(x_TK, norm_K, float(epsilon), gate_IK, up_IK, down_KI)
    return result


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        norm: torch.Tensor,
        epsilon: float,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cosines: torch.Tensor,
        sines: torch.Tensor,
    ) -> torch.Tensor:
        x, cosines, sines = x.contiguous(), cosines.contiguous(), sines.contiguous()
        ctx.save_for_backward(x, norm, query, key, value, cosines, sines)
        ctx.epsilon = epsilon
        rows = linear(_rms_norm(x, norm, epsilon), torch.cat([query, key, value]))
        _rotate(rows, rows, len(query) + len(key), cosines, sines, backwards=False)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, norm, query, key, value, cosines, sines = ctx.saved_tensors
        gradient = gradient.contiguous()
        weights, rows = torch.cat([query, key, value]), torch.empty_like(gradient)
        _rotate(gradient, rows, len(query) + len(key), cosines, sines, backwards=True)
        of_weights = (rows.T @ _rms_norm(x, norm, ctx.epsilon)).split([len(query), len(key), len(value)])
        of_x = torch.zeros_like(x)
        of_norm = _rms_norm_backward(rows @ weights, x, norm, ctx.epsilon, of_x)
        return of_x, of_norm, None, *of_weights, None, None


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        norm: torch.Tensor,
        epsilon: float,
        gate: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
    ) -> torch.Tensor:
        x = x.contiguous()
        normed = _rms_norm(x, norm, epsilon)
        gated, lifted = linear(normed, gate), linear(normed, up)
        ctx.save_for_backward(x, norm, gate, up, down, gated, lifted)
        ctx.epsilon = epsilon
        product = torch.empty_like(gated)
        _call("swiglu", gated, gated.numel(), gated, lifted, product)
        return torch.addmm(x, product, down.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, norm, gate, up, down, gated, lifted = ctx.saved_tensors
        gradient = gradient.contiguous()
        product = gradient @ down
        of_gated, of_lifted = torch.empty_like(gated), torch.empty_like(lifted)
        _call("swiglu_backward", gated, gated.numel(), product, gated, lifted, of_gated, of_lifted)
        normed = _rms_norm(x, norm, ctx.epsilon)
        of_x = gradient.clone()
        of_norm = _rms_norm_backward((of_gated @ gate).addmm_(of_lifted, up), x, norm, ctx.epsilon, of_x)
        return of_x, of_norm, None, of_gated.T @ normed, of_lifted.T @ normed, gradient.T @ product


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    normed = torch.empty_like(x)
    _call("rms_norm", x, *x.shape, epsilon, x, weight, normed)
    return normed


def _rms_norm_backward(
    upstream: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, epsilon: float, of_x: torch.Tensor
) -> torch.Tensor:
    """Adds x's gradient to `of_x`; returns the weight's."""
    parts = torch.get_num_threads()
    of_weight = torch.zeros(parts, len(weight), dtype=torch.float32)
    _call("rms_norm_backward", x, *x.shape, parts, epsilon, upstream, x, weight, of_x, of_weight)
    return of_weight.sum(0).to(weight.dtype)


def _rotate(
    rows: torch.Tensor, to: torch.Tensor, width: int, cosines: torch.Tensor, sines: torch.Tensor, backwards: bool
) -> None:
    """The first `width` components of every row, which are whole heads; the others are copied."""
    size = cosines.shape[-1]
    _call("rotate", rows, *rows.shape, width // size, size, int(backwards), cosines, sines, rows, to)


def _call(name: str, like: torch.Tensor, *arguments: torch.Tensor | float) -> None:
    call(extension(), name, like.dtype, *arguments)
