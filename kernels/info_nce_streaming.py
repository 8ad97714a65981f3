"""Triton: what the loss does between the matrix products of a chunk of rows, every Matryoshka dim in one pass.

The products themselves are the library's (cuBLAS), one for each dim's own block of components, in
float32; these kernels add the blocks up in registers, so that each is read once and no sum of them is
ever in memory. One kernel reduces over the negatives of each row, one over those of each column (the
symmetric term), and one turns the products into the gradients' operands.

Legend: R rows of the chunk (queries), C columns (passages), M dims, all row vectors of the chunk alone.
A product's row is `stride` long, a multiple of 16 with zeros after the last column, so that loads
along it need no mask; products of the next dim are `dim_stride` further.
"""

# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from drama_dist.kernels.info_nce_forward import MASKED


@triton.jit
def same_document(
    rows_R,
    columns_C,
    rows,
    columns,
    own_ids_ptr,
    passage_ids_ptr,
    excluded_ptr,
    excluded_count,
    above_ptr,
    stride,
    HAS_IDS: tl.constexpr,
    HAS_EXCLUDED: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
):
    """Of a tile: what is no negative of its row, the positive among it."""
    inside_R = rows_R < rows
    own_R = tl.load(own_ids_ptr + rows_R, mask=inside_R, other=-1)
    id_C = tl.load(passage_ids_ptr + columns_C, mask=columns_C < columns, other=-1) if HAS_IDS else columns_C
    same_RC = own_R[:, None] == id_C[None, :]
    if HAS_EXCLUDED:  # else not even an empty loop: it would give the tile another layout
        for place in range(excluded_count):
            excluded_R = tl.load(excluded_ptr + rows_R.to(tl.int64) * excluded_count + place, mask=inside_R, other=-1)
            same_RC = same_RC | (excluded_R[:, None] == id_C[None, :])
    if HAS_TEACHER:
        above_at = above_ptr + rows_R.to(tl.int64)[:, None] * stride + columns_C[None, :]
        readable_RC = inside_R[:, None] & (columns_C < stride)[None, :]
        same_RC = same_RC | (tl.load(above_at, mask=readable_RC, other=0) != 0)
    return same_RC


@triton.jit
def take_up(most_RC, total_RC, z_RC):
    """A running maximum and the sum of e^(z − maximum), each element by itself: one exponential."""
    change_RC = z_RC - most_RC
    small_RC = tl.exp(-tl.abs(change_RC))
    total_RC = tl.where(change_RC > 0, total_RC * small_RC + 1, total_RC + small_RC)
    return tl.maximum(most_RC, z_RC), total_RC


@triton.jit
def rows_kernel(
    products_ptr,  # M x R x stride
    stride,
    dim_stride,
    rows,
    columns,
    x_norms_ptr,  # M x R
    y_norms_ptr,  # M x C
    exponent,
    positives_ptr,  # R
    own_ids_ptr,  # R
    passage_ids_ptr,  # C
    excluded_ptr,
    excluded_count,
    above_ptr,
    maxima_ptr,  # splits x M x R
    sums_ptr,  # splits x M x R
    own_ptr,  # M x R
    left_out_ptr,  # splits x R: the positive is among them
    columns_per_split,
    M: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_EXCLUDED: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write each row's maximum and sum over its negatives in a share of the columns; and its positive's score."""
    rows_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside_R = rows_R < rows
    split = tl.program_id(1)
    most = ()
    total = ()
    for _ in tl.static_range(M):
        most = most + (tl.full((BLOCK_R, BLOCK_C), MASKED, dtype=tl.float32),)
        total = total + (tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32),)
    left_out_RC = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.int32)
    begin = split * columns_per_split
    end = tl.minimum(begin + columns_per_split, columns)
    for column in range(begin, end, BLOCK_C):
        columns_C = column + tl.arange(0, BLOCK_C)
        same_RC = same_document(
            rows_R,
            columns_C,
            rows,
            columns,
            own_ids_ptr,
            passage_ids_ptr,
            excluded_ptr,
            excluded_count,
            above_ptr,
            stride,
            HAS_IDS,
            HAS_EXCLUDED,
            HAS_TEACHER,
        )
        inside_C = (columns_C < end)[None, :]
        if HAS_IDS or HAS_TEACHER:
            left_out_RC += (same_RC & inside_C).to(tl.int32)
        counts_RC = inside_C & (same_RC == 0)
        at_RC = rows_R.to(tl.int64)[:, None] * stride + columns_C[None, :]
        readable_RC = inside_R[:, None] & (columns_C < stride)[None, :]
        product_RC = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
        next_most = ()
        next_total = ()
        for d in tl.static_range(M):
            product_RC += tl.load(products_ptr + d * tl.cast(dim_stride, tl.int64) + at_RC, mask=readable_RC, other=0.0)
            x_norm_R = tl.load(x_norms_ptr + d * rows + rows_R, mask=inside_R, other=0.0)
            y_norm_C = tl.load(y_norms_ptr + d * columns + columns_C, mask=columns_C < columns, other=0.0)
            score_RC = product_RC * (x_norm_R[:, None] * y_norm_C[None, :])
            z_RC = tl.where(counts_RC, score_RC * exponent, MASKED)
            taken = take_up(most[d], total[d], z_RC)
            next_most = next_most + (taken[0],)
            next_total = next_total + (taken[1],)
        most = next_most
        total = next_total
    positive_R = tl.load(positives_ptr + rows_R, mask=inside_R, other=-1)
    writes_R = rows_R < tl.where(split == 0, rows, 0)
    has_own_R = writes_R & (positive_R >= 0)
    own_R = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for d in tl.static_range(M):
        most_R = tl.max(most[d], 1)
        place_R = (split * M + d).to(tl.int64) * rows + rows_R
        tl.store(maxima_ptr + place_R, most_R, mask=inside_R)
        tl.store(sums_ptr + place_R, tl.sum(total[d] * tl.exp(most[d] - most_R[:, None]), 1), mask=inside_R)
        # In the order of operations above, and of the gradients': equal scores are equal to the last bit.
        own_at_R = products_ptr + d * tl.cast(dim_stride, tl.int64) + rows_R.to(tl.int64) * stride + positive_R
        own_R += tl.load(own_at_R, mask=has_own_R, other=0.0)
        x_norm_R = tl.load(x_norms_ptr + d * rows + rows_R, mask=inside_R, other=0.0)
        y_norm_R = tl.load(y_norms_ptr + d * columns + positive_R, mask=has_own_R, other=0.0)
        tl.store(own_ptr + d * rows + rows_R, own_R * (x_norm_R * y_norm_R), mask=writes_R)
    tl.store(left_out_ptr + split.to(tl.int64) * rows + rows_R, tl.sum(left_out_RC, 1), mask=inside_R)


@triton.jit
def columns_kernel(
    products_ptr,  # M x R x stride
    stride,
    dim_stride,
    rows,
    columns,
    x_norms_ptr,  # M x R
    y_norms_ptr,  # M x C
    exponent,
    positives_ptr,  # R
    own_ids_ptr,  # R
    passage_ids_ptr,  # C
    excluded_ptr,
    excluded_count,
    above_ptr,
    maxima_ptr,  # splits x M x C
    sums_ptr,  # splits x M x C
    rows_per_split,
    M: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_EXCLUDED: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The same for each column, over those rows of a share for which it is a negative."""
    columns_C = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_C = columns_C < columns
    split = tl.program_id(1)
    most = ()
    total = ()
    y_norms = ()
    for d in tl.static_range(M):
        y_norm_C = tl.load(y_norms_ptr + d * columns + columns_C, mask=inside_C, other=0.0)
        y_norms = y_norms + (y_norm_C,)
        most = most + (tl.full((BLOCK_R, BLOCK_C), MASKED, dtype=tl.float32),)
        total = total + (tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32),)
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, rows)
    for row in range(begin, end, BLOCK_R):
        rows_R = row + tl.arange(0, BLOCK_R)
        inside_R = rows_R < end
        same_RC = same_document(
            rows_R,
            columns_C,
            end,
            columns,
            own_ids_ptr,
            passage_ids_ptr,
            excluded_ptr,
            excluded_count,
            above_ptr,
            stride,
            HAS_IDS,
            HAS_EXCLUDED,
            HAS_TEACHER,
        )
        counts_RC = inside_R[:, None] & (same_RC == 0)
        at_RC = rows_R.to(tl.int64)[:, None] * stride + columns_C[None, :]
        readable_RC = inside_R[:, None] & (columns_C < stride)[None, :]
        product_RC = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
        next_most = ()
        next_total = ()
        for d in tl.static_range(M):
            product_RC += tl.load(products_ptr + d * tl.cast(dim_stride, tl.int64) + at_RC, mask=readable_RC, other=0.0)
            x_norm_R = tl.load(x_norms_ptr + d * rows + rows_R, mask=inside_R, other=0.0)
            score_RC = product_RC * (x_norm_R[:, None] * y_norms[d][None, :])
            z_RC = tl.where(counts_RC, score_RC * exponent, MASKED)
            taken = take_up(most[d], total[d], z_RC)
            next_most = next_most + (taken[0],)
            next_total = next_total + (taken[1],)
        most = next_most
        total = next_total
    for d in tl.static_range(M):
        most_C = tl.max(most[d], 0)
        place_C = (split * M + d).to(tl.int64) * columns + columns_C
        tl.store(maxima_ptr + place_C, most_C, mask=inside_C)
        tl.store(sums_ptr + place_C, tl.sum(total[d] * tl.exp(most[d] - most_C[None, :]), 0), mask=inside_C)


@triton.jit
def gradients_kernel(
    products_ptr,  # M x R x stride
    upstream_ptr,  # M x R x stride, in the inputs' precision
    stride,
    dim_stride,
    rows,
    columns,
    x_norms_ptr,  # M x R
    y_norms_ptr,  # M x C
    exponent,
    positives_ptr,  # R
    symmetric,
    scales_ptr,  # M
    shifts_ptr,  # M x R
    missed_ptr,  # M x R
    column_shifts_ptr,  # M x C
    own_ids_ptr,  # R
    passage_ids_ptr,  # C
    excluded_ptr,
    excluded_count,
    above_ptr,
    row_terms_ptr,  # blocks of columns x M x R
    column_terms_ptr,  # splits x M x C
    rows_per_split,
    M: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_EXCLUDED: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HAS_SYMMETRIC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write dL/dA summed over the dims that include a block, for each block, and the sums of G ∘ S."""
    block = tl.program_id(0)
    columns_C = block * BLOCK_C + tl.arange(0, BLOCK_C)
    inside_C = columns_C < columns
    split = tl.program_id(1)
    column_terms = ()
    y_norms = ()
    for d in tl.static_range(M):
        y_norm_C = tl.load(y_norms_ptr + d * columns + columns_C, mask=inside_C, other=0.0)
        y_norms = y_norms + (y_norm_C,)
        column_terms = column_terms + (tl.zeros((BLOCK_C,), dtype=tl.float32),)
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, rows)
    for row in range(begin, end, BLOCK_R):
        rows_R = row + tl.arange(0, BLOCK_R)
        inside_R = rows_R < end
        same_RC = same_document(
            rows_R,
            columns_C,
            end,
            columns,
            own_ids_ptr,
            passage_ids_ptr,
            excluded_ptr,
            excluded_count,
            above_ptr,
            stride,
            HAS_IDS,
            HAS_EXCLUDED,
            HAS_TEACHER,
        )
        # Norms of 0 keep what is outside out of all sums, but for e^(0 - shift), which may be infinite.
        counts_RC = inside_R[:, None] & inside_C[None, :] & (same_RC == 0)
        positive_R = tl.load(positives_ptr + rows_R, mask=inside_R, other=-1)
        is_own_RC = positive_R[:, None] == columns_C[None, :]
        at_RC = rows_R.to(tl.int64)[:, None] * stride + columns_C[None, :]
        readable_RC = inside_R[:, None] & (columns_C < stride)[None, :]
        product_RC = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
        upstreams = ()
        next_terms = ()
        for d in tl.static_range(M):
            product_RC += tl.load(products_ptr + d * tl.cast(dim_stride, tl.int64) + at_RC, mask=readable_RC, other=0.0)
            x_norm_R = tl.load(x_norms_ptr + d * rows + rows_R, mask=inside_R, other=0.0)
            shift_R = tl.load(shifts_ptr + d * rows + rows_R, mask=inside_R, other=0.0)
            missed_R = tl.load(missed_ptr + d * rows + rows_R, mask=inside_R, other=0.0)
            norms_RC = x_norm_R[:, None] * y_norms[d][None, :]
            score_RC = product_RC * norms_RC
            z_RC = tl.where(counts_RC, score_RC * exponent, MASKED)
            gradient_RC = tl.exp(z_RC - shift_R[:, None])
            if HAS_SYMMETRIC:
                column_shift_C = tl.load(column_shifts_ptr + d * columns + columns_C, mask=inside_C, other=0.0)
                gradient_RC += symmetric * tl.exp(z_RC - column_shift_C[None, :])
            gradient_RC = tl.load(scales_ptr + d) * tl.where(is_own_RC, -missed_R[:, None], gradient_RC)
            terms_RC = gradient_RC * score_RC
            place_R = (block * M + d).to(tl.int64) * rows + rows_R
            tl.store(row_terms_ptr + place_R, tl.sum(terms_RC, 1), mask=inside_R)
            next_terms = next_terms + (column_terms[d] + tl.sum(terms_RC, 0),)
            upstreams = upstreams + (gradient_RC * norms_RC,)
        column_terms = next_terms
        suffix_RC = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
        for d in tl.static_range(M - 1, -1, -1):
            suffix_RC += upstreams[d]
            rounded_RC = suffix_RC.to(upstream_ptr.dtype.element_ty)
            tl.store(upstream_ptr + d * tl.cast(dim_stride, tl.int64) + at_RC, rounded_RC, mask=readable_RC)
    for d in tl.static_range(M):
        place_C = (split * M + d).to(tl.int64) * columns + columns_C
        tl.store(column_terms_ptr + place_C, column_terms[d], mask=inside_C)
