"""Triton: the forward kernel. One loop over K gives the scores of every Matryoshka dim.

Each program owns a block of rows and a share of the columns, and keeps a running logsumexp per dim;
nothing of size B × N is ever in memory. Run with the roles of queries and passages exchanged
(TRANSPOSED), the same kernel gives the columns' normalisers of the symmetric term. Both sides come
padded to whole tiles, and every dim's block of components to whole BLOCK_K: loads need no masks,
which keeps registers free.

Legend: X the owner's side (R rows), Y the other (C columns), K components, M dims, MP their number
rounded up to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

MASKED = tl.constexpr(-1e30)


@triton.jit
def add_product(
    product_RC,
    x_ptr,
    y_ptr,
    rows_R,
    columns_C,
    x_stride,
    y_stride,
    first,
    end,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the product over components first..end to a tile."""
    k = first + tl.arange(0, BLOCK_K)
    x_at = x_ptr + rows_R.to(tl.int64)[:, None] * x_stride + k[None, :]
    y_at = y_ptr + columns_C.to(tl.int64)[None, :] * y_stride + k[:, None]
    for _ in range(first, end, BLOCK_K):
        product_RC = tl.dot(tl.load(x_at), tl.load(y_at), product_RC, input_precision=PRECISION)
        x_at += BLOCK_K
        y_at += BLOCK_K
    return product_RC


@triton.jit
def load_across(ptr, rows_R, columns_C, BY_ROW: tl.constexpr):
    """A vector by row or by column, shaped to spread over the tile."""
    return tl.load(ptr + rows_R)[:, None] if BY_ROW else tl.load(ptr + columns_C)[None, :]


@triton.jit
def above_margin(
    rows_R,
    columns_C,
    teacher_x_ptr,
    teacher_y_ptr,
    teacher_limits_ptr,
    teacher_size,
    HAS_TEACHER: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Where a teacher's score is above the query's limit."""
    if HAS_TEACHER:
        teacher_RC = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
        teacher_RC = add_product(
            teacher_RC,
            teacher_x_ptr,
            teacher_y_ptr,
            rows_R,
            columns_C,
            teacher_size,
            teacher_size,
            0,
            teacher_size,
            BLOCK_K,
            PRECISION,
        )
        above_RC = teacher_RC > load_across(teacher_limits_ptr, rows_R, columns_C, not TRANSPOSED)
    else:
        above_RC = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.int1)
    return above_RC


@triton.jit
def which_count(
    above_RC,
    row,
    column,
    row_count,
    column_count,
    positives_ptr,
    passage_ids_ptr,
    own_ids_ptr,
    excluded_ptr,
    excluded_count,
    TRANSPOSED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Masks of a tile that begins at (row, column): (is a positive, counts as a negative, was left out).

    Formed again for every dim: holding them over a product costs more registers than it saves work.
    """
    rows_R, columns_C = row + tl.arange(0, BLOCK_R), column + tl.arange(0, BLOCK_C)
    inside_RC = (rows_R[:, None] < row_count) & (columns_C[None, :] < column_count)
    positive = load_across(positives_ptr, rows_R, columns_C, not TRANSPOSED)
    passage = rows_R[:, None] if TRANSPOSED else columns_C[None, :]
    own_RC = (positive == passage) & inside_RC
    passage_id = load_across(passage_ids_ptr, rows_R, columns_C, TRANSPOSED)
    left_out_RC = above_RC | (load_across(own_ids_ptr, rows_R, columns_C, not TRANSPOSED) == passage_id)
    for place in range(excluded_count):
        queries = (columns_C if TRANSPOSED else rows_R).to(tl.int64) * excluded_count + place
        excluded = tl.load(excluded_ptr + queries)
        left_out_RC = left_out_RC | ((excluded[None, :] if TRANSPOSED else excluded[:, None]) == passage_id)
    other_RC = inside_RC & (own_RC == 0)
    return own_RC, other_RC & (left_out_RC == 0), other_RC & left_out_RC


@triton.jit
def forward_kernel(
    x_ptr,
    y_ptr,
    row_count,
    column_count,
    padded_rows,
    padded_columns,
    x_stride,
    y_stride,
    x_norms_ptr,  # M x R
    y_norms_ptr,  # M x C
    exponent,
    bounds_ptr,  # M + 1: where each dim's block of components begins, and the end
    dims,
    positives_ptr,
    passage_ids_ptr,
    own_ids_ptr,
    excluded_ptr,
    excluded_count,
    teacher_x_ptr,
    teacher_y_ptr,
    teacher_limits_ptr,
    teacher_size,
    maxima_ptr,  # splits x M x R
    sums_ptr,  # splits x M x R
    own_ptr,  # splits x M x R
    left_out_ptr,  # splits x R, counted once for each dim
    columns_per_split,
    MP: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write each row's maximum and sum of e^(z − maximum) over its negatives, and its positive's score."""
    row = tl.program_id(0) * BLOCK_R
    rows_R = row + tl.arange(0, BLOCK_R)
    split = tl.program_id(1)
    dim_D = tl.arange(0, MP)
    most_RD = tl.full((BLOCK_R, MP), MASKED, dtype=tl.float32)
    sum_RD = tl.zeros((BLOCK_R, MP), dtype=tl.float32)
    own_RD = tl.zeros((BLOCK_R, MP), dtype=tl.float32)
    left_out_R = tl.zeros((BLOCK_R,), dtype=tl.int32)
    begin = split * columns_per_split
    end = tl.minimum(begin + columns_per_split, column_count)
    for column in range(begin, end, BLOCK_C):
        columns_C = column + tl.arange(0, BLOCK_C)
        above_RC = above_margin(
            rows_R,
            columns_C,
            teacher_x_ptr,
            teacher_y_ptr,
            teacher_limits_ptr,
            teacher_size,
            HAS_TEACHER,
            TRANSPOSED,
            PRECISION,
            BLOCK_R,
            BLOCK_C,
            BLOCK_K,
        )
        product_RC = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
        for d in tl.range(dims, disable_licm=True):
            product_RC = add_product(
                product_RC,
                x_ptr,
                y_ptr,
                rows_R,
                columns_C,
                x_stride,
                y_stride,
                tl.multiple_of(tl.load(bounds_ptr + d), BLOCK_K),
                tl.load(bounds_ptr + d + 1),
                BLOCK_K,
                PRECISION,
            )
            is_own_RC, counts_RC, is_left_out_RC = which_count(
                above_RC,
                row,
                column,
                row_count,
                end,
                positives_ptr,
                passage_ids_ptr,
                own_ids_ptr,
                excluded_ptr,
                excluded_count,
                TRANSPOSED,
                BLOCK_R,
                BLOCK_C,
            )
            left_out_R += tl.sum(is_left_out_RC.to(tl.int32), 1)
            x_norm_R = tl.load(x_norms_ptr + d * padded_rows + rows_R)
            y_norm_C = tl.load(y_norms_ptr + d * padded_columns + columns_C)
            # In this order, as the backward kernels do: probabilities then sum to 1 to the last bit.
            score_RC = product_RC * (x_norm_R[:, None] * y_norm_C[None, :])
            here_D = (dim_D == d)[None, :]
            own_RD += tl.where(here_D, tl.sum(tl.where(is_own_RC, score_RC, 0.0), 1)[:, None], 0.0)
            z_RC = tl.where(counts_RC, score_RC * exponent, MASKED)
            before_R = tl.sum(tl.where(here_D, most_RD, 0.0), 1)
            most_R = tl.maximum(before_R, tl.max(z_RC, 1))
            # A row that has met no negative has e^0 here: its maximum says that the sum is void.
            tile_sum_R = tl.sum(tl.exp(z_RC - most_R[:, None]), 1)
            most_RD = tl.where(here_D, most_R[:, None], most_RD)
            sum_RD = tl.where(here_D, sum_RD * tl.exp(before_R - most_R)[:, None] + tile_sum_R[:, None], sum_RD)
    place_RD = (split * dims + dim_D[None, :]).to(tl.int64) * padded_rows + rows_R[:, None]
    exists_RD = dim_D[None, :] < dims
    tl.store(maxima_ptr + place_RD, most_RD, mask=exists_RD)
    tl.store(sums_ptr + place_RD, sum_RD, mask=exists_RD)
    tl.store(own_ptr + place_RD, own_RD, mask=exists_RD)
    tl.store(left_out_ptr + split.to(tl.int64) * padded_rows + rows_R, left_out_R)
