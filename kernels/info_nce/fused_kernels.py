"""Triton: the losses with their matrix products inside, every Matryoshka dim in one pass, and no scores in memory.

A tile of the product of queries and passages is one accumulator that is read off at each dim's end. One kernel reduces
over each row, over its negatives (InfoNCE) or over all columns beside a teacher's logits (soft targets); one forms the
scores again and writes the gradients' operands, summed over the dims that include a block. What these are multiplied
with is the library's (fused.py). What rows need between the two is in fused_row_kernels.py.

What does not count in a row is hidden by what the accumulator begins with: HIDDEN, which stays the least of all through
every dim, so that masks cost nothing where scores are taken up. For that the inverse norm of a vector without length is
NEAR_ZERO, not 0, and finish_kernel leaves its gradient out.

Legend: R rows of the chunk (queries), C columns (passages), K components, M dims; vectors of R are the chunk's. x and y
are descriptors of queries and passages, every dim's block of components in whole steps. Scores are in powers of two:
S · log2(e), of which x_norms has the factor. What is loaded along a tile's columns is padded to whole tiles.
"""

# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from drama_dist.kernels.info_nce import rows as statistics

MASKED = tl.constexpr(statistics.MASKED)
HIDDEN = tl.constexpr(-1e25)  # times the inverse norms of two very long vectors still below every score
NEAR_ZERO = 1e-9  # times HIDDEN and another of these still below every score, and far below other inverse norms
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def add_block(
    product_XY, x, at_x, y, at_y, BEGIN: tl.constexpr, END: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr
):
    """Add the product over the components from BEGIN to END, of the tiles that begin at the rows at_x and at_y."""
    for k in range(BEGIN, END, BLOCK_K):
        product_XY = tl.dot(x.load([at_x, k]), y.load([at_y, k]).T, product_XY, input_precision=PRECISION)
    return product_XY


@triton.jit
def take_up(product_RC, y_norm_C, x_norm_R, most_R, total_R, moment_R):
    """A tile's scores / x_norm, and the rows' highest score, sum of e and sum of e · score / x_norm so far."""
    score_RC = product_RC * y_norm_C[None, :]
    higher_R = tl.maximum(most_R, tl.max(score_RC, 1) * x_norm_R)
    share_RC = tl.exp2(score_RC * x_norm_R[:, None] - higher_R[:, None])
    kept_R = tl.exp2(most_R - higher_R)
    total_R = total_R * kept_R + tl.sum(share_RC, 1)
    return score_RC, higher_R, total_R, moment_R * kept_R + tl.sum(share_RC * score_RC, 1)


@triton.jit
def rows_kernel(
    x,  # R x K
    y,  # C x K
    rows,
    columns,
    x_norms_ptr,  # M x x_stride
    x_stride,
    y_norms_ptr,  # M x y_stride
    y_stride,
    positive_ids_ptr,  # R
    passage_ids_ptr,  # C
    excluded_ptr,  # R x excluded_count
    excluded_count,
    maxima_ptr,  # splits x M x R
    sums_ptr,  # splits x M x R
    moments_ptr,  # splits x M x R
    columns_per_split,
    ENDS: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_EXCLUDED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write, over a row's negatives in a share of the columns, the highest score, and with e = 2^(score − highest) the
    sums of e and of e · score / x_norm. Where all are hidden, the highest is below all scores.
    """
    M: tl.constexpr = len(ENDS)
    row = tl.program_id(0) * BLOCK_R
    rows_R = row + tl.arange(0, BLOCK_R)
    inside_R = rows_R < rows
    split = tl.program_id(1)
    positive_R = tl.load(positive_ids_ptr + rows_R, mask=inside_R, other=-1)
    norms = ()
    most = ()
    total = ()
    moment = ()
    for d in tl.static_range(M):
        norms = norms + (tl.load(x_norms_ptr + d * x_stride + rows_R, mask=inside_R, other=0.0),)
        most = most + (tl.full((BLOCK_R,), MASKED, dtype=tl.float32),)
        total = total + (tl.zeros((BLOCK_R,), dtype=tl.float32),)
        moment = moment + (tl.zeros((BLOCK_R,), dtype=tl.float32),)
    along_C = tl.arange(0, BLOCK_C)  # is added last, so that addresses differ by constants
    begin = split * columns_per_split
    for column in range(begin, tl.minimum(begin + columns_per_split, columns), BLOCK_C):
        columns_C = column + along_C
        id_C = tl.load(passage_ids_ptr + column + along_C) if HAS_IDS else columns_C
        hidden_RC = (positive_R[:, None] == id_C[None, :]) | (columns_C >= columns)[None, :]
        if HAS_EXCLUDED:
            for e in range(excluded_count):
                excluded_R = tl.load(excluded_ptr + rows_R.to(tl.int64) * excluded_count + e, mask=inside_R, other=-1)
                hidden_RC = hidden_RC | (excluded_R[:, None] == id_C[None, :])
        product_RC = tl.where(hidden_RC, HIDDEN, 0.0)
        next_most = ()
        next_total = ()
        next_moment = ()
        for d in tl.static_range(M):
            product_RC = add_block(product_RC, x, row, y, column, ENDS[d - 1] if d else 0, ENDS[d], BLOCK_K, PRECISION)
            y_norm_C = tl.load(y_norms_ptr + d * y_stride + column + along_C)
            _, most_R, total_R, moment_R = take_up(product_RC, y_norm_C, norms[d], most[d], total[d], moment[d])
            next_most = next_most + (most_R,)
            next_total = next_total + (total_R,)
            next_moment = next_moment + (moment_R,)
        most = next_most
        total = next_total
        moment = next_moment
    for d in tl.static_range(M):
        to_R = (split * M + d).to(tl.int64) * rows + rows_R
        tl.store(maxima_ptr + to_R, most[d], mask=inside_R)
        tl.store(sums_ptr + to_R, total[d], mask=inside_R)
        tl.store(moments_ptr + to_R, moment[d], mask=inside_R)


@triton.jit
def soft_rows_kernel(
    x,  # R x K
    y,  # C x K
    logits,  # R x C
    rows,
    columns,
    x_norms_ptr,  # M x x_stride
    x_stride,
    y_norms_ptr,  # M x y_stride
    y_stride,
    maxima_ptr,  # splits x M x R
    sums_ptr,  # splits x M x R
    moments_ptr,  # splits x M x R
    expected_ptr,  # splits x M x R
    teacher_maxima_ptr,  # splits x R
    teacher_sums_ptr,  # splits x R
    teacher_terms_ptr,  # splits x R
    columns_per_split,
    ENDS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write what rows_kernel does, over all columns of a share; of the teacher's logits, in their own units, the
    highest, and with t = e^(logit − highest) the sums of t, of t · (logit − highest) and of t · score / x_norm.
    """
    M: tl.constexpr = len(ENDS)
    row = tl.program_id(0) * BLOCK_R
    rows_R = row + tl.arange(0, BLOCK_R)
    inside_R = rows_R < rows
    split = tl.program_id(1)
    norms = ()
    most = ()
    total = ()
    moment = ()
    expected = ()
    for d in tl.static_range(M):
        norms = norms + (tl.load(x_norms_ptr + d * x_stride + rows_R, mask=inside_R, other=0.0),)
        most = most + (tl.full((BLOCK_R,), MASKED, dtype=tl.float32),)
        total = total + (tl.zeros((BLOCK_R,), dtype=tl.float32),)
        moment = moment + (tl.zeros((BLOCK_R,), dtype=tl.float32),)
        expected = expected + (tl.zeros((BLOCK_R,), dtype=tl.float32),)
    highest_R = tl.full((BLOCK_R,), MASKED, dtype=tl.float32)
    sum_R = tl.zeros((BLOCK_R,), dtype=tl.float32)
    terms_R = tl.zeros((BLOCK_R,), dtype=tl.float32)
    along_C = tl.arange(0, BLOCK_C)  # is added last, so that addresses differ by constants
    begin = split * columns_per_split
    for column in range(begin, tl.minimum(begin + columns_per_split, columns), BLOCK_C):
        columns_C = column + along_C
        outside_C = columns_C >= columns
        logit_RC = tl.where(outside_C[None, :], MASKED, logits.load([row, column]))
        higher_R = tl.maximum(highest_R, tl.max(logit_RC, 1))
        below_RC = logit_RC - higher_R[:, None]
        target_RC = tl.exp2(below_RC * LOG2_E)
        held_R = tl.exp2((highest_R - higher_R) * LOG2_E)
        terms_R = held_R * (terms_R + (highest_R - higher_R) * sum_R) + tl.sum(target_RC * below_RC, 1)
        sum_R = held_R * sum_R + tl.sum(target_RC, 1)
        highest_R = higher_R
        product_RC = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32) + tl.where(outside_C, HIDDEN, 0.0)[None, :]
        next_most = ()
        next_total = ()
        next_moment = ()
        next_expected = ()
        for d in tl.static_range(M):
            product_RC = add_block(product_RC, x, row, y, column, ENDS[d - 1] if d else 0, ENDS[d], BLOCK_K, PRECISION)
            y_norm_C = tl.load(y_norms_ptr + d * y_stride + column + along_C)
            score_RC, most_R, total_R, moment_R = take_up(product_RC, y_norm_C, norms[d], most[d], total[d], moment[d])
            next_most = next_most + (most_R,)
            next_total = next_total + (total_R,)
            next_moment = next_moment + (moment_R,)
            next_expected = next_expected + (expected[d] * held_R + tl.sum(target_RC * score_RC, 1),)
        most = next_most
        total = next_total
        moment = next_moment
        expected = next_expected
    to_R = split.to(tl.int64) * rows + rows_R
    tl.store(teacher_maxima_ptr + to_R, highest_R, mask=inside_R)
    tl.store(teacher_sums_ptr + to_R, sum_R, mask=inside_R)
    tl.store(teacher_terms_ptr + to_R, terms_R, mask=inside_R)
    for d in tl.static_range(M):
        to_R = (split * M + d).to(tl.int64) * rows + rows_R
        tl.store(maxima_ptr + to_R, most[d], mask=inside_R)
        tl.store(sums_ptr + to_R, total[d], mask=inside_R)
        tl.store(moments_ptr + to_R, moment[d], mask=inside_R)
        tl.store(expected_ptr + to_R, expected[d], mask=inside_R)


@triton.jit
def gradients_kernel(
    x,  # R x K
    y,  # C x K
    logits,  # R x C; without a teacher anything
    upstream,  # M * y_stride x R: bfloat16 for bfloat16 operands, else float32
    rows,
    columns,
    x_norms_ptr,  # M x x_stride
    x_stride,
    y_norms_ptr,  # M x y_stride
    y_stride,
    positives_ptr,  # M x r_stride: the same column for every dim; −1 where it is elsewhere
    positive_ids_ptr,  # R
    passage_ids_ptr,  # C
    excluded_ptr,  # R x excluded_count
    excluded_count,
    scales_ptr,  # M: a dim's weight / log2(e)
    shifts_ptr,  # M x r_stride; beyond the rows so large that nothing is left
    other_ptr,  # M x r_stride, what a positive misses; with a teacher r_stride, the logsumexp of its logits
    r_stride,
    column_terms_ptr,  # splits x M x C
    rows_per_split,
    ENDS: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HAS_IDS: tl.constexpr,
    HAS_EXCLUDED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write dL/dA summed over the dims that include a block, for each block, transposed; and the columns' sums of
    G ∘ S. Tiles are transposed, so that these sums go along a tile's rows.
    """
    M: tl.constexpr = len(ENDS)
    column = tl.program_id(0) * BLOCK_C
    columns_C = column + tl.arange(0, BLOCK_C)
    inside_C = columns_C < columns
    split = tl.program_id(1)
    norms = ()
    column_terms = ()
    for d in tl.static_range(M):
        norms = norms + (tl.load(y_norms_ptr + d * y_stride + columns_C),)
        column_terms = column_terms + (tl.zeros((BLOCK_C,), dtype=tl.float32),)
    along_R = tl.arange(0, BLOCK_R)  # is added last, so that addresses differ by constants
    begin = split * rows_per_split
    for row in range(begin, tl.minimum(begin + rows_per_split, rows), BLOCK_R):
        rows_R = row + along_R
        product_CR = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
        if HAS_TEACHER:
            below_RC = logits.load([row, column]) - tl.load(other_ptr + row + along_R)[:, None]
            target_CR = tl.where(inside_C[:, None] & (rows_R < rows)[None, :], tl.exp2(below_RC.T * LOG2_E), 0.0)
        else:
            if HAS_IDS:
                is_positive_CR = tl.load(positives_ptr + row + along_R)[None, :] == columns_C[:, None]
                id_C = tl.load(passage_ids_ptr + columns_C)
                same_CR = tl.load(positive_ids_ptr + row + along_R)[None, :] == id_C[:, None]
                if HAS_EXCLUDED:
                    for e in range(excluded_count):
                        at_R = excluded_ptr + rows_R.to(tl.int64) * excluded_count + e
                        same_CR = same_CR | (tl.load(at_R, mask=rows_R < rows, other=-1)[None, :] == id_C[:, None])
                product_CR = tl.where(same_CR & (is_positive_CR == 0), HIDDEN, 0.0)
        next_terms = ()
        upstreams = ()
        for d in tl.static_range(M):
            product_CR = add_block(product_CR, y, column, x, row, ENDS[d - 1] if d else 0, ENDS[d], BLOCK_K, PRECISION)
            x_norm_R = tl.load(x_norms_ptr + d * x_stride + row + along_R)
            shift_R = tl.load(shifts_ptr + d * r_stride + row + along_R)
            score_CR = product_CR * norms[d][:, None]
            gradient_CR = tl.exp2(score_CR * x_norm_R[None, :] - shift_R[None, :])
            if HAS_TEACHER:
                gradient_CR = gradient_CR - target_CR
            else:
                missed_R = tl.load(other_ptr + d * r_stride + row + along_R)
                # Each dim's own copy of the positives, else the first comparison is kept, in bits that take longer.
                positive_R = tl.load(positives_ptr + d * r_stride + row + along_R)
                gradient_CR = tl.where(positive_R[None, :] == columns_C[:, None], -missed_R[None, :], gradient_CR)
            gradient_CR = gradient_CR * x_norm_R[None, :]
            next_terms = next_terms + (column_terms[d] + tl.sum(gradient_CR * score_CR, 1),)
            upstreams = upstreams + (gradient_CR * (norms[d] * tl.load(scales_ptr + d))[:, None],)
        column_terms = next_terms
        suffix_CR = tl.zeros((BLOCK_C, BLOCK_R), dtype=tl.float32)
        for d in tl.static_range(M - 1, -1, -1):
            suffix_CR += upstreams[d]
            upstream.store([d * y_stride + column, row], suffix_CR.to(upstream.dtype))
    for d in tl.static_range(M):
        to_C = (split * M + d).to(tl.int64) * columns + columns_C
        tl.store(column_terms_ptr + to_C, column_terms[d] * tl.load(scales_ptr + d), mask=inside_C)
