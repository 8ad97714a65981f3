"""The public contrastive loss: InfoNCE for all Matryoshka dims at once.

Covers checking the arguments, and figures beside the loss. Knows nothing of ranks: the caller gathers passages and
scales by its share of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from drama_dist.kernels.info_nce.arguments import check_sides, nested_dims
from drama_dist.kernels.info_nce.autograd import nested_loss
from drama_dist.kernels.info_nce.problem import ColumnPart, Contrast
from drama_dist.kernels.info_nce.reference import info_nce_reference


@dataclass(frozen=True)
class InfoNCE:
    """loss: differentiable scalar. per_dim: M contrastive losses, in the order of dims.

    At the largest dim: accuracy, the share of queries whose positive has the best score; margins, B: score(positive) −
    score(best negative) in units of 1/temperature, NaN where a query has no negative. masked: how many (query, passage)
    pairs did not count.
    """

    loss: torch.Tensor
    per_dim: torch.Tensor
    accuracy: torch.Tensor
    margins: torch.Tensor
    masked: torch.Tensor


def info_nce(
    queries: torch.Tensor,
    passages: torch.Tensor,
    positives: torch.Tensor,
    *,
    temperature: float,
    dims: Sequence[int] | None = None,
    dim_weights: Sequence[float] | None = None,
    passage_ids: torch.Tensor | None = None,
    excluded_ids: torch.Tensor | None = None,
    part: ColumnPart | None = None,
    rounded: bool = False,
    backend: str = "auto",
) -> InfoNCE:
    """Σ_d w_d · mean_i ( logsumexp_j S^d_ij − S^d_iy(i) ), S^d the cosine of the first d components / temperature.

    InfoNCE is van den Oord et al. 2018, eq. 4; nested dims are Kusupati et al. 2022, eq. 1.

    queries: B × K and passages: N × K, not normalised, of one floating dtype on one device; a vector of length 1e-12 or
    less has scores of 0 and no gradient. positives: int64 (B), the column of each query's positive. temperature: a
    number from 1e-6 on. dims: M different numbers, default (K,). dim_weights: in the same order, default 1/M each.
    passage_ids: int64 (N); columns with the positive's id under another column do not count.
    excluded_ids: int64 B × E, ids that are no negatives of a query (its other positives, what the judgements call
    relevant), -1 where there are fewer; needs passage_ids, which are then from 0 on. Every other passage is a negative.
    part: the passages are some of the columns, and positives is -1 where a query's positive is not among them; the
    result is that over all parts, masked is the part's own, and so are the gradients of the passages. The gradients
    of the queries are its share: their sum over the parts is the whole.
    rounded: `cuda` and `fused` may round float32 vectors to bfloat16, and with them dL/dA, for their products; norms,
    sums and gradients stay float32. The other backends do not.
    backend: reference, eager, cpu, cuda or fused; auto asks `select_backend`. Autocast does not reach inside: products
    are in the inputs' precision, but for `rounded`, and sums in float32 at least. Gradients are of first order only,
    but for the reference's.
    Raises ValueError where shapes, dtypes, dims, weights, columns, ids, the temperature or the backend do not fit, and
    RuntimeError from a backward pass with create_graph.
    """
    check_sides(queries, passages, temperature)
    nested = nested_dims(dims, dim_weights, queries.shape[1])
    _check_columns(positives, len(queries), len(passages), least=-1 if part else 0)
    _check_ids(passage_ids, excluded_ids, part, len(queries), len(passages))
    problem = Contrast(
        positives_B=positives,
        dims=nested.dims,
        weights=nested.weights,
        passage_ids_N=passage_ids,
        excluded_ids_BE=excluded_ids,
        part=part,
        rounded=rounded,
    )
    loss, per_dim, margins, masked = nested_loss(
        queries, passages, float(temperature), problem, backend, info_nce_reference
    )
    has_negative = ~margins.isnan()
    accuracy = torch.where(has_negative, margins > 0, True).to(loss.dtype).mean()
    return InfoNCE(loss, per_dim[nested.order], accuracy, margins, masked.sum())


def _check_columns(positives: torch.Tensor, rows: int, columns: int, least: int) -> None:
    if positives.shape != (rows,) or positives.dtype != torch.int64:
        raise ValueError(f"expected {rows} int64 positives, got {tuple(positives.shape)} {positives.dtype}")
    first, last = torch.stack(positives.aminmax()).tolist()  # one wait for a GPU, not two
    if first < least or last >= columns:
        raise ValueError(f"positives name columns {first}..{last} of {columns}")


def _check_ids(
    passage_ids: torch.Tensor | None,
    excluded_ids: torch.Tensor | None,
    part: ColumnPart | None,
    rows: int,
    columns: int,
) -> None:
    if excluded_ids is not None and passage_ids is None:
        raise ValueError("excluded_ids: expected passage_ids beside them")
    if part is not None and part.positive_ids is None:
        raise ValueError("part.positive_ids: expected the ids of all queries' positives, got None")
    shapes = {"passage_ids": (passage_ids, (columns,)), "part.positive_ids": (part and part.positive_ids, (rows,))}
    for name, (ids, shape) in shapes.items():
        if ids is not None and (ids.shape != shape or ids.dtype != torch.int64):
            raise ValueError(f"expected {shape[0]} int64 {name}, got {tuple(ids.shape)} {ids.dtype}")
    if excluded_ids is None or passage_ids is None:
        return
    if excluded_ids.ndim != 2 or len(excluded_ids) != rows or excluded_ids.dtype != torch.int64:
        raise ValueError(
            f"expected int64 excluded_ids of {rows} rows, got {tuple(excluded_ids.shape)} {excluded_ids.dtype}"
        )
    if int(passage_ids.min()) < 0:
        raise ValueError(f"passage id {int(passage_ids.min())}: expected ids from 0 on, -1 stands for no excluded id")
