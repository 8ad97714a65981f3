"""Triton: what fused.py needs of single rows, before, between and after the kernels that see all columns.

The positives' own scores, the shares of the columns put together, and what the gradients' kernel loads along its tiles.

Legend: R rows of the chunk (queries), M dims. Scores are in powers of two where it says so: S · log2(e).
"""

# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from drama_dist.kernels.info_nce.fused_kernels import LOG2_E, MASKED, add_block

NOTHING_LEFT = tl.constexpr(1e30)  # a shift


@triton.jit
def positives_kernel(
    x,  # R x K
    positive,  # R x K: each row's positive, some other passage where it is elsewhere
    rows,
    x_norms_ptr,  # M x x_stride, with the factor log2(e)
    x_stride,
    y_norms_ptr,  # M x y_stride
    y_stride,
    positives_ptr,  # R: −1 where it is elsewhere
    scores_ptr,  # M x R
    ENDS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write each positive's score S, 0 where it is elsewhere.

    Summed up as in rows_kernel, on the diagonal of a tile, so that equal scores are equal to the last bit.
    """
    row = tl.program_id(0) * BLOCK_R
    at = tl.arange(0, BLOCK_R)
    rows_R = row + at
    inside_R = rows_R < rows
    positive_R = tl.load(positives_ptr + rows_R, mask=inside_R, other=-1)
    here_R = positive_R >= 0
    product_RR = tl.zeros((BLOCK_R, BLOCK_R), dtype=tl.float32)
    for d in tl.static_range(len(ENDS)):
        product_RR = add_block(product_RR, x, row, positive, row, ENDS[d - 1] if d else 0, ENDS[d], BLOCK_K, PRECISION)
        product_R = tl.sum(tl.where(at[:, None] == at[None, :], product_RR, 0.0), 1)
        x_norm_R = tl.load(x_norms_ptr + d * x_stride + rows_R, mask=inside_R, other=0.0)
        y_norm_R = tl.load(y_norms_ptr + d * y_stride + positive_R, mask=here_R, other=0.0)
        score_R = tl.where(here_R, product_R * y_norm_R * x_norm_R / LOG2_E, 0.0)
        tl.store(scores_ptr + d * rows + rows_R, score_R, mask=inside_R)


@triton.jit
def merge_kernel(
    maxima_ptr,  # splits x M x R, in powers of two; these three as rows_kernel writes them
    sums_ptr,
    moments_ptr,
    splits,
    rows,
    dims,
    x_norms_ptr,  # M x x_stride
    x_stride,
    lowest,  # below all scores, in powers of two
    most_ptr,  # M x R, in powers of two
    total_ptr,  # M x R
    mean_ptr,  # M x R
    logsumexp_ptr,  # M x R
    best_ptr,  # M x R
    BLOCK_R: tl.constexpr,
):
    """Put the shares of the columns together: the highest score, in powers of two and as it is, the sum of
    e^(S − highest), the mean of S by these, and their logsumexp; MASKED, and 0, where no column counts.
    """
    rows_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(1)
    inside_R = rows_R < rows
    most_R = tl.full((BLOCK_R,), MASKED, dtype=tl.float32)
    total_R = tl.zeros((BLOCK_R,), dtype=tl.float32)
    moment_R = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for split in range(splits):
        at_R = (split * dims + d).to(tl.int64) * rows + rows_R
        of_split_R = tl.load(maxima_ptr + at_R, mask=inside_R, other=MASKED)
        higher_R = tl.maximum(most_R, of_split_R)
        kept_R = tl.exp2(most_R - higher_R)
        share_R = tl.exp2(of_split_R - higher_R)
        total_R = kept_R * total_R + share_R * tl.load(sums_ptr + at_R, mask=inside_R, other=0.0)
        moment_R = kept_R * moment_R + share_R * tl.load(moments_ptr + at_R, mask=inside_R, other=0.0)
        most_R = higher_R
    counts_R = most_R > lowest
    x_norm_R = tl.load(x_norms_ptr + d * x_stride + rows_R, mask=inside_R, other=0.0)
    to_R = d * rows + rows_R
    # A NaN is no number more than `lowest`, nor less: it stays what it is.
    nothing_R = most_R <= lowest
    mean_R = moment_R / tl.where(nothing_R, 1.0, total_R) * x_norm_R / LOG2_E
    logsumexp_R = (most_R + tl.log2(total_R)) / LOG2_E
    tl.store(most_ptr + to_R, tl.where(nothing_R, MASKED, most_R), mask=inside_R)
    tl.store(total_ptr + to_R, tl.where(nothing_R, 0.0, total_R), mask=inside_R)
    tl.store(mean_ptr + to_R, tl.where(nothing_R, 0.0, mean_R), mask=inside_R)
    tl.store(logsumexp_ptr + to_R, tl.where(nothing_R, MASKED, logsumexp_R), mask=inside_R)
    tl.store(best_ptr + to_R, tl.where(counts_R, most_R / LOG2_E, MASKED), mask=inside_R)


@triton.jit
def shifts_kernel(
    shift_ptr,  # M x R
    other_ptr,  # M x R: what a positive misses; with a teacher R: the logsumexp of its logits over all parts
    rows,
    most_ptr,  # M x R; these four as merge_kernel writes them
    total_ptr,
    mean_ptr,
    logsumexp_ptr,
    target_ptr,  # M x R: S of the positive; with a teacher the mean of S by its targets here
    teacher_ptr,  # R: with a teacher the logsumexp of its logits here
    positives_ptr,  # R
    weights_ptr,  # M
    shifts_ptr,  # M x r_stride
    others_ptr,  # M x r_stride; with a teacher r_stride
    columns_ptr,  # M x r_stride
    r_stride,
    row_terms_ptr,  # M x terms_stride
    terms_stride,
    HAS_TEACHER: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Write what gradients_kernel loads, to the end of its tiles, and a row's sums of G ∘ S from what the rows gave."""
    rows_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(1)
    inside_R = rows_R < rows
    at_R = d * rows + rows_R
    to_R = d * r_stride + rows_R
    most_R = tl.load(most_ptr + at_R, mask=inside_R, other=0.0)
    total_R = tl.load(total_ptr + at_R, mask=inside_R, other=0.0)
    # From the logsumexp in powers of two: its value in the other unit, and back, is not the same to the last bit.
    own_R = tl.where(total_R > 0, most_R + tl.log2(tl.maximum(total_R, 1e-30)), MASKED)
    rise_R = tl.load(shift_ptr + at_R, mask=inside_R, other=0.0)
    rise_R -= tl.load(logsumexp_ptr + at_R, mask=inside_R, other=0.0)
    shift_R = tl.where(inside_R, own_R + rise_R * LOG2_E, NOTHING_LEFT)
    tl.store(shifts_ptr + to_R, shift_R)
    share_R = total_R * tl.exp2(most_R - shift_R)
    if HAS_TEACHER:
        other_R = tl.load(other_ptr + rows_R, mask=inside_R, other=0.0)
        tl.store(others_ptr + rows_R, other_R)
        target_R = tl.exp2((tl.load(teacher_ptr + rows_R, mask=inside_R, other=0.0) - other_R) * LOG2_E)
    else:
        target_R = tl.load(other_ptr + at_R, mask=inside_R, other=0.0)
        tl.store(others_ptr + to_R, target_R)
        tl.store(columns_ptr + to_R, tl.load(positives_ptr + rows_R, mask=inside_R, other=-1))
    term_R = share_R * tl.load(mean_ptr + at_R, mask=inside_R, other=0.0)
    term_R -= target_R * tl.load(target_ptr + at_R, mask=inside_R, other=0.0)
    term_R *= tl.load(weights_ptr + d)
    tl.store(row_terms_ptr + d * terms_stride + rows_R, term_R, mask=inside_R)
