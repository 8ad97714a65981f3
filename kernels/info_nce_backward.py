"""Triton: the backward kernels. A component block needs one product, with the sum of the gradients of
the dims that include it.

Two forms, equal in result. Separate: a program owns a block of rows and a segment of the components,
and sums over all columns in registers; deterministic; scores are formed again for every segment.
Shared: a program owns one tile of scores, forms it once, and adds its share to both sides with
atomics; four products in all, and the order of additions is the machine's.

Legend: X the owner's side (R rows), Y the other (C columns), K components, M dims, MP their number
rounded up to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from drama_dist.kernels.info_nce_forward import MASKED, above_margin, add_product, load_across, which_count


@triton.jit
def gradient_of_scores(
    score_RC,
    own_RC,
    counts_RC,
    rows_R,
    columns_C,
    exponent,
    scale,
    symmetric,
    shifts_ptr,
    missed_ptr,
    column_shifts_ptr,
    HAS_SYMMETRIC: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """dL/dS of a tile for one dim: softmax minus one-hot, of both directions."""
    z_RC = tl.where(counts_RC, score_RC * exponent, MASKED)
    gradient_RC = tl.exp(z_RC - load_across(shifts_ptr, rows_R, columns_C, not TRANSPOSED))
    if HAS_SYMMETRIC:
        gradient_RC += symmetric * tl.exp(z_RC - load_across(column_shifts_ptr, rows_R, columns_C, TRANSPOSED))
    return scale * tl.where(own_RC, -load_across(missed_ptr, rows_R, columns_C, not TRANSPOSED), gradient_RC)


@triton.jit
def separate_kernel(
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
    symmetric,
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
    scales_ptr,  # M
    shifts_ptr,  # M x B
    missed_ptr,  # M x B
    column_shifts_ptr,  # M x N
    segments_ptr,  # segments x 3: first component, end, index of the smallest dim that includes it
    gradient_ptr,  # R x K
    terms_ptr,  # M x R
    MP: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HAS_SYMMETRIC: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """Write dL/dA · Y for a block of rows and one segment, and the rows' sums of G ∘ S."""
    row = tl.program_id(0) * BLOCK_R
    rows_R = row + tl.arange(0, BLOCK_R)
    segment = tl.program_id(1)
    first = tl.multiple_of(tl.load(segments_ptr + 3 * segment), BLOCK_K)
    end = tl.multiple_of(tl.load(segments_ptr + 3 * segment + 1), BLOCK_K)
    smallest = tl.load(segments_ptr + 3 * segment + 2)
    components_S = first + tl.arange(0, SEGMENT)
    dim_D = tl.arange(0, MP)
    gradient_RS = tl.zeros((BLOCK_R, SEGMENT), dtype=tl.float32)
    terms_RD = tl.zeros((BLOCK_R, MP), dtype=tl.float32)
    query_count = padded_columns if TRANSPOSED else padded_rows
    passage_count = padded_rows if TRANSPOSED else padded_columns
    for column in range(0, column_count, BLOCK_C):
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
        upstream_RC = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
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
            own_RC, counts_RC, _ = which_count(
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
                TRANSPOSED,
                BLOCK_R,
                BLOCK_C,
            )
            x_norm_R = tl.load(x_norms_ptr + d * padded_rows + rows_R)
            y_norm_C = tl.load(y_norms_ptr + d * padded_columns + columns_C)
            norms_RC = x_norm_R[:, None] * y_norm_C[None, :]
            score_RC = product_RC * norms_RC
            gradient_RC = gradient_of_scores(
                score_RC,
                own_RC,
                counts_RC,
                rows_R,
                columns_C,
                exponent,
                tl.load(scales_ptr + d),
                symmetric,
                shifts_ptr + d * query_count,
                missed_ptr + d * query_count,
                column_shifts_ptr + d * passage_count,
                HAS_SYMMETRIC,
                TRANSPOSED,
            )
            terms_RD += tl.where((dim_D == d)[None, :], tl.sum(gradient_RC * score_RC, 1)[:, None], 0.0)
            upstream_RC += gradient_RC * norms_RC * tl.where(d >= smallest, 1.0, 0.0)
        y_CS = tl.load(
            y_ptr + columns_C.to(tl.int64)[:, None] * y_stride + components_S[None, :],
            mask=components_S[None, :] < end,
            other=0.0,
        )
        gradient_RS = tl.dot(upstream_RC.to(y_CS.dtype), y_CS, gradient_RS, input_precision=PRECISION)
    tl.store(
        gradient_ptr + rows_R.to(tl.int64)[:, None] * x_stride + components_S[None, :],
        gradient_RS,
        mask=components_S[None, :] < end,
    )
    if segment == 0:
        tl.store(
            terms_ptr + dim_D[None, :] * padded_rows + rows_R[:, None],
            terms_RD,
            mask=dim_D[None, :] < dims,
        )


@triton.jit
def shared_kernel(
    x_ptr,
    y_ptr,
    row_count,
    column_count,
    padded_rows,
    padded_columns,
    x_stride,
    y_stride,
    x_norms_ptr,  # M x B
    y_norms_ptr,  # M x N
    exponent,
    symmetric,
    positives_ptr,
    passage_ids_ptr,
    own_ids_ptr,
    excluded_ptr,
    excluded_count,
    teacher_x_ptr,
    teacher_y_ptr,
    teacher_limits_ptr,
    teacher_size,
    scales_ptr,  # M
    shifts_ptr,  # M x B
    missed_ptr,  # M x B
    column_shifts_ptr,  # M x N
    x_gradient_ptr,  # B x K, zeros
    y_gradient_ptr,  # N x K, zeros
    x_terms_ptr,  # M x B, zeros
    y_terms_ptr,  # M x N, zeros
    ENDS: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HAS_SYMMETRIC: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add one tile's share to both sides' gradients; X are the queries."""
    row, column = tl.program_id(0) * BLOCK_R, tl.program_id(1) * BLOCK_C
    rows_R, columns_C = row + tl.arange(0, BLOCK_R), column + tl.arange(0, BLOCK_C)
    above_RC = above_margin(
        rows_R,
        columns_C,
        teacher_x_ptr,
        teacher_y_ptr,
        teacher_limits_ptr,
        teacher_size,
        HAS_TEACHER,
        False,
        PRECISION,
        BLOCK_R,
        BLOCK_C,
        BLOCK_K,
    )
    product_RC = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    upstreams = ()
    for d in tl.static_range(len(ENDS)):
        product_RC = add_product(
            product_RC,
            x_ptr,
            y_ptr,
            rows_R,
            columns_C,
            x_stride,
            y_stride,
            ENDS[d - 1] if d else 0,
            ENDS[d],
            BLOCK_K,
            PRECISION,
        )
        own_RC, counts_RC, _ = which_count(
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
            False,
            BLOCK_R,
            BLOCK_C,
        )
        x_norm_R = tl.load(x_norms_ptr + d * padded_rows + rows_R)
        y_norm_C = tl.load(y_norms_ptr + d * padded_columns + columns_C)
        norms_RC = x_norm_R[:, None] * y_norm_C[None, :]
        score_RC = product_RC * norms_RC
        gradient_RC = gradient_of_scores(
            score_RC,
            own_RC,
            counts_RC,
            rows_R,
            columns_C,
            exponent,
            tl.load(scales_ptr + d),
            symmetric,
            shifts_ptr + d * padded_rows,
            missed_ptr + d * padded_rows,
            column_shifts_ptr + d * padded_columns,
            HAS_SYMMETRIC,
            False,
        )
        terms_RC = gradient_RC * score_RC
        tl.atomic_add(x_terms_ptr + d * padded_rows + rows_R, tl.sum(terms_RC, 1))
        tl.atomic_add(y_terms_ptr + d * padded_columns + columns_C, tl.sum(terms_RC, 0))
        upstreams = upstreams + (gradient_RC * norms_RC,)  # type: ignore[assignment]
    suffix_RC = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for d in tl.static_range(len(ENDS) - 1, -1, -1):
        suffix_RC += upstreams[d]
        for begin in range(ENDS[d - 1] if d else 0, ENDS[d], BLOCK_K):
            k = begin + tl.arange(0, BLOCK_K)
            x_at = rows_R.to(tl.int64)[:, None] * x_stride + k[None, :]
            y_at = columns_C.to(tl.int64)[:, None] * y_stride + k[None, :]
            x_RK = tl.load(x_ptr + x_at)
            y_CK = tl.load(y_ptr + y_at)
            tl.atomic_add(x_gradient_ptr + x_at, tl.dot(suffix_RC.to(y_CK.dtype), y_CK, input_precision=PRECISION))
            y_gradient_CK = tl.dot(tl.trans(suffix_RC.to(x_RK.dtype)), x_RK, input_precision=PRECISION)
            tl.atomic_add(y_gradient_ptr + y_at, y_gradient_CK)
