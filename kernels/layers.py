"""A transformer layer on the CPU with everything between its matrix products fused: layers.cpp.

Covers the projections to heads (RMSNorm, rotary positions, heads of rows), the way back to rows, and the feed-forward
part (RMSNorm, SwiGLU, residual), with gradients. What a pass over memory can give again is not kept for the
backward pass: of a layer only its input, heads, gate and up are. Does not attend, and knows no model.

bfloat16 or float32, arithmetic in float32, rounded once. Weights are out × in, as in nn.Linear. Shapes: T tokens of B
sequences, K components, H heads of D components, I inner components.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from drama_dist.kernels.libraries import library

_WIDTH = 16  # components of a vector in layers.cpp


def extension() -> ctypes.CDLL | None:
    """The compiled library; None (with one warning) where it cannot be built."""
    return library("layers", "training goes on with slower PyTorch operations")


def fits(hidden: int, inner: int, head: int) -> bool:
    """Whether layers.cpp takes these widths."""
    return hidden % _WIDTH == 0 and inner % _WIDTH == 0 and head % (2 * _WIDTH) == 0


def project_heads(
    x_TK: torch.Tensor,
    norm_K: torch.Tensor,
    epsilon: float,
    weights: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    rotary_TD: tuple[torch.Tensor, torch.Tensor],
    boundaries_B1: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of all heads after RMSNorm; queries and keys rotated.

    weights: of queries, keys and values; rotary_TD: cosines and sines, in x's dtype; boundaries_B1: int32. Each
    result is flat: for every sequence H × length × D, one sequence after another.
    """
    projected: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _ProjectHeads.apply(
        x_TK, norm_K, epsilon, *weights, *rotary_TD, boundaries_B1
    )
    return projected


def merge_heads(heads: torch.Tensor, head: int, boundaries_B1: torch.Tensor) -> torch.Tensor:
    """Flat heads, as of `project_heads`, to T × H · D."""
    merged: torch.Tensor = _MergeHeads.apply(heads, head, boundaries_B1)
    return merged


def feed_forward(
    x_TK: torch.Tensor,
    norm_K: torch.Tensor,
    epsilon: float,
    gate_IK: torch.Tensor,
    up_IK: torch.Tensor,
    down_KI: torch.Tensor,
) -> torch.Tensor:
    """x + down(silu(gate(n)) · up(n)), n = RMSNorm(x); T × K."""
    result: torch.Tensor = _FeedForward.apply(x_TK, norm_K, epsilon, gate_IK, up_IK, down_KI)
    return result


class _ProjectHeads(torch.autograd.Function):
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
        boundaries: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(x, norm, query, key, value, cosines, sines, boundaries)
        ctx.epsilon = epsilon
        rows = linear(_rms_norm(x, norm, epsilon), torch.cat([query, key, value]))
        heads = [x.new_empty(len(x) * len(weight)) for weight in (query, key, value)]
        _move_heads(rows, heads, boundaries, (cosines, sines), 1)
        return tuple(heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, norm, query, key, value, cosines, sines, boundaries = ctx.saved_tensors
        weights = torch.cat([query, key, value])
        rows = x.new_empty(len(x), len(weights))
        _move_heads(rows, [gradient.contiguous() for gradient in gradients], boundaries, (cosines, sines), -1)
        of_weights = (rows.T @ _rms_norm(x, norm, ctx.epsilon)).split([len(query), len(key), len(value)])
        of_x = torch.zeros_like(x)
        of_norm = _rms_norm_backward(rows @ weights, x, norm, ctx.epsilon, of_x)
        return of_x, of_norm, None, *of_weights, None, None, None


class _MergeHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: torch.Tensor, head: int, boundaries: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(boundaries)
        ctx.head = head
        tokens = int(boundaries[-1])
        rows = heads.new_empty(tokens, heads.numel() // tokens)
        _move_heads(rows, [heads.contiguous()], boundaries, head, -1)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        heads = gradient.new_empty(gradient.numel())
        _move_heads(gradient.contiguous(), [heads], ctx.saved_tensors[0], ctx.head, 1)
        return heads, None, None


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
    of_weight = torch.zeros(parts, len(weight))
    _call("rms_norm_backward", x, *x.shape, parts, epsilon, upstream, x, weight, of_x, of_weight)
    return of_weight.sum(0).to(weight.dtype)


def _move_heads(
    rows: torch.Tensor,
    heads: list[torch.Tensor],
    boundaries: torch.Tensor,
    rotary_or_head: tuple[torch.Tensor, torch.Tensor] | int,
    direction: int,
) -> None:
    """Between rows, in which `heads` lie side by side, and heads; the first two are rotated where there is a rotary."""
    rotary = None if isinstance(rotary_or_head, int) else rotary_or_head
    size = rotary_or_head if isinstance(rotary_or_head, int) else rotary_or_head[0].shape[-1]
    column = 0
    for place, part in enumerate(heads):
        width = part.numel() // len(rows)
        cosines, sines = rotary if rotary and place < 2 else (None, None)
        shape = (len(boundaries) - 1, boundaries, width // size, size, rows.shape[1], float(direction))
        _call("heads", rows, *shape, cosines, sines, rows[:, column:], part)
        column += width


def _call(name: str, like: torch.Tensor, *arguments: torch.Tensor | float | None) -> None:
    """Call the library's function for `like`'s dtype."""
    compiled = extension()
    assert compiled is not None
    getattr(compiled, f"drama_{name}_{str(like.dtype).removeprefix('torch.')}")(*map(_as_c, arguments))


def _as_c(value: torch.Tensor | float | None) -> Any:
    if isinstance(value, torch.Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if value is None:
        return ctypes.c_void_p()
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int64(value)
