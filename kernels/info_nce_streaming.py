"""InfoNCE over row chunks in PyTorch operations: the backend that needs no GPU.

Scores of every Matryoshka dim are snapshots of one product, and the gradients are computed in the
forward pass, since the upstream gradient is a scalar: three matrix products whatever the number
of dims, and never a B × N matrix. Computes in float32 (float64 for float64 inputs).

Shapes: B queries, N passages, K components, R rows of a chunk. A is the product over the first d
components; the score is S = A / (|q| |p| temperature).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from drama_dist.kernels.reference import columns_to_mask

_CHUNK_ELEMENTS = 1 << 22  # scores of one chunk and dim: 16 MiB in float32
_MASKED = -1e30  # finite: a masked score times a zero probability must stay zero


@dataclass
class _Totals:
    """What the row chunks add up to."""

    per_dim_M: torch.Tensor
    query_gradient_BK: torch.Tensor
    passage_gradient_NK: torch.Tensor
    correct: torch.Tensor
    margin: torch.Tensor


class StreamingInfoNCE(torch.autograd.Function):
    """Forward returns (loss, per-dim losses, accuracy, mean margin); only the loss has a gradient."""

    @staticmethod
    def forward(  # type: ignore[override]
        context: torch.autograd.function.FunctionCtx,
        queries_BK: torch.Tensor,
        passages_NK: torch.Tensor,
        positives_B: torch.Tensor,
        temperature: float,
        dims: Sequence[int],
        dim_weights: Sequence[float],
        passage_ids_N: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        precision = torch.promote_types(queries_BK.dtype, torch.float32)
        query, passage = queries_BK.to(precision), passages_NK.to(precision)
        totals = _stream(query, passage, positives_B, temperature, dims, dim_weights, passage_ids_N)
        context.save_for_backward(
            totals.query_gradient_BK.to(queries_BK.dtype), totals.passage_gradient_NK.to(passages_NK.dtype)
        )
        loss = (totals.per_dim_M * totals.per_dim_M.new_tensor(list(dim_weights))).sum()
        outputs = (loss, totals.per_dim_M, totals.correct, totals.margin)
        context.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(context, upstream, *_):  # type: ignore[no-untyped-def, override]
        query_gradient, passage_gradient = context.saved_tensors
        return upstream * query_gradient, upstream * passage_gradient, None, None, None, None, None


def _stream(
    query: torch.Tensor,
    passage: torch.Tensor,
    positives_B: torch.Tensor,
    temperature: float,
    dims: Sequence[int],
    dim_weights: Sequence[float],
    passage_ids_N: torch.Tensor | None,
) -> _Totals:
    rows, columns = len(query), len(passage)
    totals = _Totals(
        query.new_zeros(len(dims)),
        torch.zeros_like(query),
        torch.zeros_like(passage),
        query.new_zeros(()),
        query.new_zeros(()),
    )
    passage_norms = _inverse_norms(passage, dims)
    query_norms = _inverse_norms(query, dims)
    column_terms = passage.new_zeros(len(dims), columns)
    for begin in range(0, rows, max(1, _CHUNK_ELEMENTS // columns)):
        chunk = slice(begin, begin + max(1, _CHUNK_ELEMENTS // columns))
        masked = columns_to_mask(positives_B[chunk], columns, passage_ids_N) if passage_ids_N is not None else None
        scales = [weight / rows for weight in dim_weights]
        norms = [(q[chunk] / temperature, p) for q, p in zip(query_norms, passage_norms, strict=True)]
        _add_chunk(totals, chunk, query, passage, positives_B[chunk], dims, scales, norms, masked, column_terms)
    for index, dim in enumerate(dims):
        totals.passage_gradient_NK[:, :dim] -= passage[:, :dim] * (
            column_terms[index] * passage_norms[index].square()
        ).unsqueeze(1)
    totals.per_dim_M /= rows
    totals.correct /= rows
    totals.margin /= rows
    return totals


def _inverse_norms(vectors: torch.Tensor, dims: Sequence[int]) -> list[torch.Tensor]:
    """1 / |first d components| of each row, for each d; an all-zero row counts as tiny, not as infinite."""
    floor = 1e-12  # as torch.nn.functional.normalize
    return [vectors[:, :dim].norm(dim=1).clamp_min(floor).reciprocal() for dim in dims]


def _add_chunk(
    totals: _Totals,
    chunk: slice,
    query: torch.Tensor,
    passage: torch.Tensor,
    positives_R: torch.Tensor,
    dims: Sequence[int],
    scales: Sequence[float],
    norms: list[tuple[torch.Tensor, torch.Tensor]],
    masked_RN: torch.Tensor | None,
    column_terms: torch.Tensor,
) -> None:
    """Add one row chunk's losses, statistics and gradients to the totals."""
    query_R = query[chunk]
    product_RN = query.new_zeros(len(query_R), len(passage))
    upstream_products = []
    previous = 0
    for index, dim in enumerate(dims):
        product_RN = torch.addmm(product_RN, query_R[:, previous:dim], passage[:, previous:dim].T)
        previous = dim
        row_norm, column_norm = norms[index]
        scores_RN = product_RN * row_norm.unsqueeze(1) * column_norm
        if masked_RN is not None:
            scores_RN.masked_fill_(masked_RN, _MASKED)
        gradient_RN = _softmax_minus_one_hot(totals, index, scores_RN, positives_R, last=index == len(dims) - 1)
        gradient_RN *= scales[index]
        scores_RN *= gradient_RN
        row_term = scores_RN.sum(1) * row_norm_squared(query_R, dim)
        totals.query_gradient_BK[chunk, :dim] -= query_R[:, :dim] * row_term.unsqueeze(1)
        column_terms[index] += scores_RN.sum(0)
        upstream_products.append(gradient_RN.mul_(row_norm.unsqueeze(1)).mul_(column_norm))
    suffix_RN = torch.zeros_like(product_RN)
    for index in reversed(range(len(dims))):
        suffix_RN += upstream_products[index]
        block = slice(dims[index - 1] if index else 0, dims[index])
        totals.query_gradient_BK[chunk, block] += suffix_RN @ passage[:, block]
        totals.passage_gradient_NK[:, block] += suffix_RN.T @ query_R[:, block]


def row_norm_squared(query_R: torch.Tensor, dim: int) -> torch.Tensor:
    """1 / |first d components|² of each row."""
    return _inverse_norms(query_R, [dim])[0].square()


def _softmax_minus_one_hot(
    totals: _Totals, index: int, scores_RN: torch.Tensor, positives_R: torch.Tensor, last: bool
) -> torch.Tensor:
    """Add a dim's losses (and, for the last dim, the statistics); return d(sum of losses)/d(scores)."""
    at_positive = positives_R.unsqueeze(1)
    positive_R = scores_RN.gather(1, at_positive).squeeze(1)
    normaliser_R = scores_RN.logsumexp(1)
    totals.per_dim_M[index] += (normaliser_R - positive_R).sum()
    if last:
        rivals_R = scores_RN.scatter(1, at_positive, _MASKED).amax(1)
        totals.correct += (positive_R > rivals_R).sum()
        totals.margin += torch.where(rivals_R > _MASKED / 2, positive_R - rivals_R, 0).sum()
    gradient_RN = (scores_RN - normaliser_R.unsqueeze(1)).exp_()
    one = torch.full_like(at_positive, -1, dtype=gradient_RN.dtype)
    return gradient_RN.scatter_add_(1, at_positive, one)
