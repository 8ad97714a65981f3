"""Triton: what the losses do between the matrix products of a chunk of rows, every Matryoshka dim in one pass.

The products themselves are the library's (cuBLAS), one for each dim's own block of components, in
float32; these kernels add the blocks up in registers, so that each is read once and no sum of them is
ever in memory. One kernel reduces over each row, over its negatives (InfoNCE) or over all columns beside a
teacher's logits (soft targets), and one turns the products into the gradients' operands.

Legend: R rows of the chunk (queries), C columns (passages), M dims, all row vectors of the chunk alone.
A product's row is `stride` long, a multiple of 16 with zeros after the last column, so that loads
along it need no mask; products of the next dim, and after the last the teacher's logits, are `dim_stride` further.
"""

# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from drama_dist.kernels.info_nce import rows as statistics

MASKED = tl.constexpr(statistics.MASKED)


@triton.jit
def same_document(
    rows_R,
    columns_C,
    rows,
    columns,
    positive_ids_ptr,
    passage_ids_ptr,
    excluded_ptr,
    excluded_count,
    HAS_IDS: tl.constexpr,
    HAS_EXCLUDED: tl.constexpr,
):
    """Of a tile: what is no negative of its row, the positive among it."""
    inside_R = rows_R < rows
    positive_R = tl.load(positive_ids_ptr + rows_R, mask=inside_R, other=-1)
    id_C = tl.load(passage_ids_ptr + columns_C, mask=columns_C < columns, other=-1) if HAS_IDS else columns_C
    same_RC = positive_R[:, None] == id_C[None, :]
    if HAS_EXCLUDED:  # else not even an empty loop: it would give the tile another layout
        for e in range(excluded_count):
            excluded_R = tl.load(excluded_ptr + rows_R.to(tl.int64) * excluded_count + e, mask=inside_R, other=-1)
            same_RC = same_RC | (excluded_R[:, None] == id_C[None, :])
    return same_RC


@triton.jit
def take_up(most_RC, total_RC, score_RC):
    """A running maximum and the sum of e^(score − maximum), each element by itself: one exponential."""
    change_RC = score_RC - most_RC
    small_RC = tl.exp(-tl.abs(change_RC))
    total_RC = tl.where(change_RC > 0, total_RC * small_RC + 1, total_RC + small_RC)
    return tl.maximum(most_RC, score_RC), total_RC


@triton.jit
def rows_kernel(
    products_ptr,  # M x R x stride
    stride,
    dim_stride,
    rows,
    columns,
    x_norms_ptr,  # M x R
    y_norms_ptr,  # M x C
    positives_ptr,  # R
    positive_ids_ptr,  # R
    passage_ids_ptr,  # C
    excluded_ptr,
    excluded_count,
    maxima_ptr,  # splits x M x R
    sums_ptr,  # splits x M x R
    scores_ptr,  # M x R: of the positives
    left_out_ptr,  # splits x R: the positive is among them
    columns_per_split,
    M: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_EXCLUDED: tl.constexpr,
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
            positive_ids_ptr,
            passage_ids_ptr,
            excluded_ptr,
            excluded_count,
            HAS_IDS,
            HAS_EXCLUDED,
        )
        inside_C = (columns_C < end)[None, :]
        if HAS_IDS:
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
            negative_RC = tl.where(counts_RC, score_RC, MASKED)
            taken = take_up(most[d], total[d], negative_RC)
            next_most = next_most + (taken[0],)
            next_total = next_total + (taken[1],)
        most = next_most
        total = next_total
    positive_R = tl.load(positives_ptr + rows_R, mask=inside_R, other=-1)
    writes_R = rows_R < tl.where(split == 0, rows, 0)
    here_R = writes_R & (positive_R >= 0)
    score_R = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for d in tl.static_range(M):
        most_R = tl.max(most[d], 1)
        to_R = (split * M + d).to(tl.int64) * rows + rows_R
        tl.store(maxima_ptr + to_R, most_R, mask=inside_R)
        tl.store(sums_ptr + to_R, tl.sum(total[d] * tl.exp(most[d] - most_R[:, None]), 1), mask=inside_R)
        # In the order of operations above, and of the gradients': equal scores are equal to the last bit.
        at_R = products_ptr + d * tl.cast(dim_stride, tl.int64) + rows_R.to(tl.int64) * stride + positive_R
        score_R += tl.load(at_R, mask=here_R, other=0.0)
        x_norm_R = tl.load(x_norms_ptr + d * rows + rows_R, mask=inside_R, other=0.0)
        y_norm_R = tl.load(y_norms_ptr + d * columns + positive_R, mask=here_R, other=0.0)
        tl.store(scores_ptr + d * rows + rows_R, score_R * (x_norm_R * y_norm_R), mask=writes_R)
    tl.store(left_out_ptr + split.to(tl.int64) * rows + rows_R, tl.sum(left_out_RC, 1), mask=inside_R)


@triton.jit
def soft_rows_kernel(
    products_ptr,  # M + 1 x R x stride: the last are the teacher's logits
    stride,
    dim_stride,
    rows,
    columns,
    x_norms_ptr,  # M x R
    y_norms_ptr,  # M x C
    maxima_ptr,  # splits x M x R
    sums_ptr,  # splits x M x R
    teacher_maxima_ptr,  # splits x R
    teacher_sums_ptr,  # splits x R
    teacher_terms_ptr,  # splits x R
    expected_ptr,  # splits x M x R
    columns_per_split,
    M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write each row's maximum and sum in a share of the columns, of the scores and of the teacher's logits; and, with
    x = logit − maximum, the sums of e^x · x and of e^x · score.
    """
    rows_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside_R = rows_R < rows
    split = tl.program_id(1)
    most = ()
    total = ()
    expected = ()
    for _ in tl.static_range(M):
        most = most + (tl.full((BLOCK_R, BLOCK_C), MASKED, dtype=tl.float32),)
        total = total + (tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32),)
        expected = expected + (tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32),)
    highest_RC = tl.full((BLOCK_R, BLOCK_C), MASKED, dtype=tl.float32)
    sum_RC = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    terms_RC = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    begin = split * columns_per_split
    end = tl.minimum(begin + columns_per_split, columns)
    for column in range(begin, end, BLOCK_C):
        columns_C = column + tl.arange(0, BLOCK_C)
        inside_C = (columns_C < end)[None, :]
        at_RC = rows_R.to(tl.int64)[:, None] * stride + columns_C[None, :]
        readable_RC = inside_R[:, None] & (columns_C < stride)[None, :]
        logits_ptr = products_ptr + M * tl.cast(dim_stride, tl.int64)
        logit_RC = tl.where(inside_C, tl.load(logits_ptr + at_RC, mask=readable_RC, other=0.0), MASKED)
        change_RC = logit_RC - highest_RC
        small_RC = tl.exp(-tl.abs(change_RC))
        kept_RC = tl.where(change_RC > 0, small_RC, 1.0)  # of what was summed up, which was relative to a lower maximum
        weight_RC = tl.where(change_RC > 0, 1.0, small_RC)
        rise_RC = tl.maximum(change_RC, 0.0)
        terms_RC = kept_RC * (terms_RC - rise_RC * sum_RC) + weight_RC * tl.minimum(change_RC, 0.0)
        sum_RC = kept_RC * sum_RC + weight_RC
        highest_RC = tl.maximum(highest_RC, logit_RC)
        product_RC = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
        next_most = ()
        next_total = ()
        next_expected = ()
        for d in tl.static_range(M):
            product_RC += tl.load(products_ptr + d * tl.cast(dim_stride, tl.int64) + at_RC, mask=readable_RC, other=0.0)
            x_norm_R = tl.load(x_norms_ptr + d * rows + rows_R, mask=inside_R, other=0.0)
            y_norm_C = tl.load(y_norms_ptr + d * columns + columns_C, mask=columns_C < columns, other=0.0)
            score_RC = product_RC * (x_norm_R[:, None] * y_norm_C[None, :])
            taken = take_up(most[d], total[d], tl.where(inside_C, score_RC, MASKED))
            next_most = next_most + (taken[0],)
            next_total = next_total + (taken[1],)
            next_expected = next_expected + (kept_RC * expected[d] + weight_RC * score_RC,)
        most = next_most
        total = next_total
        expected = next_expected
    highest_R = tl.max(highest_RC, 1)
    below_RC = highest_RC - highest_R[:, None]
    share_RC = tl.exp(below_RC)
    to_R = split.to(tl.int64) * rows + rows_R
    tl.store(teacher_maxima_ptr + to_R, highest_R, mask=inside_R)
    tl.store(teacher_sums_ptr + to_R, tl.sum(share_RC * sum_RC, 1), mask=inside_R)
    tl.store(teacher_terms_ptr + to_R, tl.sum(share_RC * (terms_RC + below_RC * sum_RC), 1), mask=inside_R)
    for d in tl.static_range(M):
        most_R = tl.max(most[d], 1)
        to_R = (split * M + d).to(tl.int64) * rows + rows_R
        tl.store(maxima_ptr + to_R, most_R, mask=inside_R)
        tl.store(sums_ptr + to_R, tl.sum(total[d] * tl.exp(most[d] - most_R[:, None]), 1), mask=inside_R)
        tl.store(expected_ptr + to_R, tl.sum(share_RC * expected[d], 1), mask=inside_R)


@triton.jit
def gradients_kernel(
    products_ptr,  # M x R x stride; with a teacher M + 1, the last are its logits
    upstream_ptr,  # M x R x stride: bfloat16 for bfloat16 inputs, else float32
    stride,
    dim_stride,
    rows,
    columns,
    x_norms_ptr,  # M x R
    y_norms_ptr,  # M x C
    positives_ptr,  # R
    scales_ptr,  # M
    shifts_ptr,  # M x R
    other_ptr,  # M x R: what a positive misses; with a teacher R: the logsumexp of its logits
    positive_ids_ptr,  # R
    passage_ids_ptr,  # C
    excluded_ptr,
    excluded_count,
    row_terms_ptr,  # blocks of columns x M x R
    column_terms_ptr,  # splits x M x C
    rows_per_split,
    M: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_EXCLUDED: tl.constexpr,
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
        if not HAS_TEACHER:
            same_RC = same_document(
                rows_R,
                columns_C,
                end,
                columns,
                positive_ids_ptr,
                passage_ids_ptr,
                excluded_ptr,
                excluded_count,
                HAS_IDS,
                HAS_EXCLUDED,
            )
        # Norms of 0 keep what is outside out of all sums, but for e^(0 - shift), which may be infinite.
        counts_RC = inside_R[:, None] & inside_C[None, :]
        if not HAS_TEACHER:
            counts_RC = counts_RC & (same_RC == 0)
            positive_R = tl.load(positives_ptr + rows_R, mask=inside_R, other=-1)
            is_positive_RC = positive_R[:, None] == columns_C[None, :]
        at_RC = rows_R.to(tl.int64)[:, None] * stride + columns_C[None, :]
        readable_RC = inside_R[:, None] & (columns_C < stride)[None, :]
        if HAS_TEACHER:
            logits_ptr = products_ptr + M * tl.cast(dim_stride, tl.int64)
            logit_RC = tl.load(logits_ptr + at_RC, mask=readable_RC, other=0.0)
            logit_RC = tl.where(counts_RC, logit_RC, MASKED)
            target_RC = tl.exp(logit_RC - tl.load(other_ptr + rows_R, mask=inside_R, other=0.0)[:, None])
        product_RC = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
        upstreams = ()
        next_terms = ()
        for d in tl.static_range(M):
            product_RC += tl.load(products_ptr + d * tl.cast(dim_stride, tl.int64) + at_RC, mask=readable_RC, other=0.0)
            x_norm_R = tl.load(x_norms_ptr + d * rows + rows_R, mask=inside_R, other=0.0)
            shift_R = tl.load(shifts_ptr + d * rows + rows_R, mask=inside_R, other=0.0)
            norms_RC = x_norm_R[:, None] * y_norms[d][None, :]
            score_RC = product_RC * norms_RC
            negative_RC = tl.where(counts_RC, score_RC, MASKED)
            gradient_RC = tl.exp(negative_RC - shift_R[:, None])
            if HAS_TEACHER:
                gradient_RC = gradient_RC - target_RC
            else:
                missed_R = tl.load(other_ptr + d * rows + rows_R, mask=inside_R, other=0.0)
                gradient_RC = tl.where(is_positive_RC, -missed_R[:, None], gradient_RC)
            gradient_RC = tl.load(scales_ptr + d) * gradient_RC
            terms_RC = gradient_RC * score_RC
            to_R = (block * M + d).to(tl.int64) * rows + rows_R
            tl.store(row_terms_ptr + to_R, tl.sum(terms_RC, 1), mask=inside_R)
            next_terms = next_terms + (column_terms[d] + tl.sum(terms_RC, 0),)
            upstreams = upstreams + (gradient_RC * norms_RC,)
        column_terms = next_terms
        suffix_RC = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
        for d in tl.static_range(M - 1, -1, -1):
            suffix_RC += upstreams[d]
            rounded_RC = suffix_RC.to(upstream_ptr.dtype.element_ty)
            tl.store(upstream_ptr + d * tl.cast(dim_stride, tl.int64) + at_RC, rounded_RC, mask=readable_RC)
    for d in tl.static_range(M):
        to_C = (split * M + d).to(tl.int64) * columns + columns_C
        tl.store(column_terms_ptr + to_C, column_terms[d], mask=inside_C)
