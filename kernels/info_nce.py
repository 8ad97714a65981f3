"""The public contrastive loss: InfoNCE for all Matryoshka dims at once.

Covers checking the arguments and choosing the backend. Knows nothing of ranks: the caller gathers
passages and scales by its share of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from drama_dist.kernels.info_nce_streaming import StreamingInfoNCE
from drama_dist.kernels.reference import info_nce_reference

BACKENDS = ("auto", "streaming", "reference")


@dataclass(frozen=True)
class InfoNCE:
    """loss: differentiable scalar. per_dim: M losses, in the order of dims.

    accuracy: share of queries whose positive has the best score; margin: mean of score(positive) −
    score(best negative), in units of 1/temperature; both at the largest dim, and None from the reference.
    """

    loss: torch.Tensor
    per_dim: torch.Tensor
    accuracy: torch.Tensor | None
    margin: torch.Tensor | None


def info_nce(
    queries: torch.Tensor,
    passages: torch.Tensor,
    positives: torch.Tensor,
    *,
    temperature: float,
    dims: Sequence[int] | None = None,
    dim_weights: Sequence[float] | None = None,
    passage_ids: torch.Tensor | None = None,
    backend: str = "auto",
) -> InfoNCE:
    """Σ_d w_d · mean_i ( logsumexp_j S^d_ij − S^d_iy(i) ), S^d the cosine of the first d components / temperature.

    InfoNCE is van den Oord et al. 2018, eq. 4; nested dims are Kusupati et al. 2022, eq. 1.

    queries: B × K and passages: N × K, not normalised. positives: int64 (B), the column of each query's
    positive. dims: M different numbers, default (K,). dim_weights: in the same order, default 1/M each.
    passage_ids: int64 (N); columns with the positive's id under another column do not count. Every other
    passage is a negative.
    Raises ValueError where shapes, dims, weights, columns or the temperature do not fit.
    """
    dims = list(dims) if dims else [queries.shape[1]]
    weights = list(dim_weights) if dim_weights else [1 / len(dims)] * len(dims)
    _check(queries, passages, positives, temperature, dims, weights, passage_ids, backend)
    if backend == "reference":
        loss, per_dim = info_nce_reference(queries, passages, positives, temperature, dims, weights, passage_ids)
        return InfoNCE(loss, per_dim, None, None)
    ascending, sorted_weights = zip(*sorted(zip(dims, weights, strict=True)), strict=True)
    loss, per_dim, accuracy, margin = StreamingInfoNCE.apply(
        queries, passages, positives, temperature, ascending, sorted_weights, passage_ids
    )
    return InfoNCE(loss, per_dim[[ascending.index(dim) for dim in dims]], accuracy, margin)


def _check(
    queries: torch.Tensor,
    passages: torch.Tensor,
    positives: torch.Tensor,
    temperature: float,
    dims: Sequence[int],
    weights: Sequence[float],
    passage_ids: torch.Tensor | None,
    backend: str,
) -> None:
    if queries.ndim != 2 or passages.ndim != 2 or queries.shape[1] != passages.shape[1] or not len(queries):
        raise ValueError(
            f"expected queries B × K and passages N × K, got {tuple(queries.shape)}, {tuple(passages.shape)}"
        )
    if positives.shape != (len(queries),) or positives.dtype != torch.int64:
        raise ValueError(f"expected {len(queries)} int64 positives, got {tuple(positives.shape)} {positives.dtype}")
    if int(positives.min()) < 0 or int(positives.max()) >= len(passages):
        raise ValueError(f"positives name columns {int(positives.min())}..{int(positives.max())} of {len(passages)}")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: expected more than 0")
    if min(dims) < 1 or max(dims) > queries.shape[1] or len(set(dims)) != len(dims):
        raise ValueError(f"dims={list(dims)}: expected different numbers from 1 to {queries.shape[1]}")
    if len(weights) != len(dims):
        raise ValueError(f"dim_weights={list(weights)}: expected one for each of dims={list(dims)}")
    if passage_ids is not None and passage_ids.shape != (len(passages),):
        raise ValueError(f"expected {len(passages)} passage ids, got {tuple(passage_ids.shape)}")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: expected one of {', '.join(BACKENDS)}")
