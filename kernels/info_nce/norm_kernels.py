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
    norms_ptr,  # M x stride
    rows,
    stride,
    scale,
    floor,  # a vector whose norm is not above it counts as zero
    nothing,  # what it has instead of an inverse, and so have the rows after the last
    DIMS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write scale / |v| of a row's first components, for every dim; one program for each of `stride` rows."""
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)
    square = 0.0
    for d in tl.static_range(len(DIMS)):
        components_K = (DIMS[d - 1] if d else 0) + k
        at_K = vectors_ptr + row.to(tl.int64) * vector_stride + components_K
        vector_K = tl.load(at_K, mask=components_K < tl.where(row < rows, DIMS[d], 0), other=0.0).to(tl.float32)
        square += tl.sum(vector_K * vector_K, 0)
        norm = tl.sqrt(square)
        inverse = scale / tl.where(norm <= floor, float("inf"), norm)
        tl.store(norms_ptr + d * stride + row, tl.where(norm <= floor, nothing, inverse))


@triton.jit
def finish_kernel(
    products_ptr,  # R x K, float32: with dL/dA
    vectors_ptr,  # R x K
    vector_stride,
    terms_ptr,  # M x stride: sums of G ∘ S
    norms_ptr,  # M x stride, as norms_kernel wrote them
    stride,
    result_ptr,  # R x K
    width,
    scale,  # of the norms
    nothing,  # of a vector without length, which gets no gradient
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
        norm = tl.load(norms_ptr + d * stride + row)
        has_length = norm != nothing
        norm = tl.where(has_length, norm, 0.0) / scale
        factor += tl.load(terms_ptr + d * stride + row) * norm * norm
        components_K = (DIMS[d - 1] if d else 0) + k
        inside_K = components_K < DIMS[d]
        at_K = vectors_ptr + row.to(tl.int64) * vector_stride + components_K
        vector_K = tl.load(at_K, mask=inside_K, other=0.0).to(tl.float32)
        product_K = tl.load(products_ptr + start + components_K, mask=inside_K, other=0.0)
        if d == len(DIMS) - 1:  # of the whole vector: without any length there
            exists = has_length
        gradient_K = tl.where(exists, share * (product_K - factor * vector_K), 0.0)
        tl.store(result_ptr + start + components_K, gradient_K.to(result_ptr.dtype.element_ty), mask=inside_K)
    for first in range(DIMS[len(DIMS) - 1], width, BLOCK_K):
        nothing_K = tl.zeros((BLOCK_K,), dtype=result_ptr.dtype.element_ty)
        tl.store(result_ptr + start + first + k, nothing_K, mask=first + k < width)
