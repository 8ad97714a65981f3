"""Triton: what norms have to do with the loss, one program for each vector.

Their inverses for every Matryoshka dim, before the first product; and after the last, the terms that
they add to the gradient (see tiles.py for the formula).

Legend: R vectors, K components, M dims.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def norms_kernel(
    vectors_ptr,  # R x K
    vector_stride,
    norms_ptr,  # M x R
    rows,
    scale,
    floor,  # a vector whose norm is not above it counts as zero
    DIMS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write scale / |v| of a row's first components, for every dim; 0 where |v| is at most the floor."""
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)
    square = 0.0
    for d in tl.static_range(len(DIMS)):
        components_K = (DIMS[d - 1] if d else 0) + k
        at_K = vectors_ptr + row.to(tl.int64) * vector_stride + components_K
        vector_K = tl.load(at_K, mask=components_K < DIMS[d], other=0.0).to(tl.float32)
        square += tl.sum(vector_K * vector_K, 0)
        norm = tl.sqrt(square)
        tl.store(norms_ptr + d * rows + row, scale / tl.where(norm <= floor, float("inf"), norm))


@triton.jit
def finish_kernel(
    products_ptr,  # R x K, float32: with dL/dA
    vectors_ptr,  # R x K
    vector_stride,
    terms_ptr,  # M x R: sums of G ∘ S
    norms_ptr,  # M x R, as norms_kernel wrote them
    result_ptr,  # R x K
    rows,
    width,
    scale,  # of the norms
    share,
    DIMS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write share · (a row's product − what the norms add), and zeros for components of no dim."""
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)
    start = row.to(tl.int64) * width
    factor = 0.0
    for d in tl.static_range(len(DIMS) - 1, -1, -1):
        norm = tl.load(norms_ptr + d * rows + row) / scale
        factor += tl.load(terms_ptr + d * rows + row) * norm * norm
        components_K = (DIMS[d - 1] if d else 0) + k
        inside_K = components_K < DIMS[d]
        at_K = vectors_ptr + row.to(tl.int64) * vector_stride + components_K
        vector_K = tl.load(at_K, mask=inside_K, other=0.0).to(tl.float32)
        product_K = tl.load(products_ptr + start + components_K, mask=inside_K, other=0.0)
        gradient_K = share * (product_K - factor * vector_K)
        tl.store(result_ptr + start + components_K, gradient_K.to(result_ptr.dtype.element_ty), mask=inside_K)
    for first in range(DIMS[len(DIMS) - 1], width, BLOCK_K):
        nothing_K = tl.zeros((BLOCK_K,), dtype=result_ptr.dtype.element_ty)
        tl.store(result_ptr + start + first + k, nothing_K, mask=first + k < width)
