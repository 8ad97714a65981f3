"""The public contrastive loss: InfoNCE for all Matryoshka dims at once.

Covers checking the arguments and choosing the backend. Knows nothing of ranks: the caller gathers
passages and scales by its share of the rows.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from drama_dist.kernels.distillation import distillation_loss
from drama_dist.kernels.eager_tiles import EagerTiles
from drama_dist.kernels.fused import FusedInfoNCE
from drama_dist.kernels.problem import ColumnPart, Distillation, Problem, TeacherMargin
from drama_dist.kernels.reference import info_nce_reference
from drama_dist.kernels.tiles import Tiles

BACKENDS = ("auto", "triton", "triton-separate", "triton-shared", "streaming", "reference")


@dataclass(frozen=True)
class InfoNCE:
    """loss: differentiable scalar. per_dim: M contrastive losses, in the order of dims.

    At the largest dim (all None from the reference): accuracy, the share of queries whose positive has
    the best score; margins, B: score(positive) − score(best negative) in units of 1/temperature, NaN
    where a query has no negative; margin, their mean. masked: how many (query, passage) pairs did not count.
    """

    loss: torch.Tensor
    per_dim: torch.Tensor
    accuracy: torch.Tensor | None
    margin: torch.Tensor | None
    margins: torch.Tensor | None
    masked: torch.Tensor | None


def info_nce(
    queries: torch.Tensor,
    passages: torch.Tensor,
    positives: torch.Tensor,
    *,
    temperature: float | torch.Tensor,
    dims: Sequence[int] | None = None,
    dim_weights: Sequence[float] | None = None,
    passage_ids: torch.Tensor | None = None,
    excluded_ids: torch.Tensor | None = None,
    teacher: TeacherMargin | None = None,
    hardness: float = 0.0,
    symmetric: float = 0.0,
    distillation: Distillation | None = None,
    part: ColumnPart | None = None,
    backend: str = "auto",
) -> InfoNCE:
    """Σ_d w_d · mean_i ( logsumexp_j S^d_ij − S^d_iy(i) ), S^d the cosine of the first d components / temperature.

    InfoNCE is van den Oord et al. 2018, eq. 4; nested dims are Kusupati et al. 2022, eq. 1.

    queries: B × K and passages: N × K, not normalised. positives: int64 (B), the column of each query's
    positive. temperature: a number, or a scalar tensor that gets a gradient. dims: M different numbers,
    default (K,). dim_weights: in the same order, default 1/M each.
    passage_ids: int64 (N); columns with the positive's id under another column do not count.
    excluded_ids: int64 B × E, ids that are no negatives of a query (its other positives, what the
    judgements call relevant), -1 where there are fewer; needs passage_ids. teacher: leaves out what a
    teacher finds nearly as good as the positive. Every other passage is a negative.
    hardness: α adds α · cosine, without gradient, to the scores of negatives (LLaVE, Lan et al. 2025, eq. 3).
    symmetric: weight of the same loss from each positive to the queries (CLIP, Radford et al. 2021,
    figure 3); queries that share the positive are left out. distillation: adds a teacher's divergence.
    part: the passages are some of the columns, and positives is -1 where a query's positive is not among them; the
    result is that over all parts, masked is the part's own, and so are the gradients of the passages. The gradients
    of queries and temperature are its share: their sum over the parts is the whole.
    backend: auto is triton on CUDA, and streaming elsewhere. Both form the scores of a chunk of rows at a time.
    triton-separate and triton-shared keep no scores, and form them again for the gradients; the sums of the latter
    differ in the last bits from run to run.
    Raises ValueError where shapes, dims, weights, columns or the temperature do not fit.
    """
    dims = list(dims) if dims else [queries.shape[1]]
    weights = list(dim_weights) if dim_weights else [1 / len(dims)] * len(dims)
    _check(queries, passages, positives, dims, weights, -1 if part else 0)
    _check_options(queries, passages, temperature, passage_ids, excluded_ids, teacher, distillation, backend)
    if part is not None and (symmetric or teacher or distillation or backend == "reference"):
        raise ValueError("part: expected no symmetric term, teacher, distillation or reference: they need all columns")
    ascending, sorted_weights = zip(*sorted(zip(dims, weights, strict=True)), strict=True)
    problem = Problem(
        positives, ascending, sorted_weights, passage_ids, excluded_ids, teacher, hardness, symmetric, part
    )
    result = _contrastive(queries, passages, temperature, problem, _choose(backend, queries))
    loss = result.loss
    if distillation is not None:
        divergence = distillation_loss(queries, passages, temperature, problem, distillation)
        loss = loss + distillation.weight * divergence
    in_given_order = result.per_dim[[ascending.index(dim) for dim in dims]]
    return InfoNCE(loss, in_given_order, result.accuracy, result.margin, result.margins, result.masked)


def _choose(backend: str, queries: torch.Tensor) -> str:
    if backend != "auto":
        return backend
    return "triton" if queries.is_cuda else "streaming"


def _contrastive(
    queries: torch.Tensor,
    passages: torch.Tensor,
    temperature: float | torch.Tensor,
    problem: Problem,
    backend: str,
) -> InfoNCE:
    if backend == "reference":
        loss, per_dim = info_nce_reference(queries, passages, temperature, problem)
        return InfoNCE(loss, per_dim, None, None, None, None)
    scalar = torch.as_tensor(temperature, dtype=torch.float64 if queries.dtype == torch.float64 else torch.float32)
    loss, per_dim, margins, masked = FusedInfoNCE.apply(
        queries, passages, scalar.to(queries.device), problem, _tiles(backend, queries)
    )
    rivalled = ~margins.isnan()
    accuracy = torch.where(rivalled, margins > 0, True).to(loss.dtype).mean()
    margin = torch.where(rivalled, margins, 0).sum() / rivalled.sum().clamp_min(1)
    return InfoNCE(loss, per_dim, accuracy, margin, margins, masked)


def _tiles(backend: str, queries: torch.Tensor) -> type[Tiles]:
    if backend.startswith("triton"):
        from drama_dist.kernels.streaming_tiles import StreamingTiles
        from drama_dist.kernels.triton_tiles import SharedTritonTiles, TritonTiles

        tiles = {"triton": StreamingTiles, "triton-separate": TritonTiles, "triton-shared": SharedTritonTiles}
        return tiles[backend]
    from drama_dist.kernels.compiled_tiles import CompiledTiles, extension

    compiled = not queries.is_cuda and queries.dtype != torch.float64 and extension() is not None
    return CompiledTiles if compiled else EagerTiles


def _check(
    queries: torch.Tensor,
    passages: torch.Tensor,
    positives: torch.Tensor,
    dims: Sequence[int],
    weights: Sequence[float],
    least: int,
) -> None:
    if queries.ndim != 2 or passages.ndim != 2 or queries.shape[1] != passages.shape[1] or not len(queries):
        raise ValueError(
            f"expected queries B × K and passages N × K, got {tuple(queries.shape)}, {tuple(passages.shape)}"
        )
    if (queries.dtype, queries.device) != (passages.dtype, passages.device):
        raise ValueError(
            f"expected queries and passages of one dtype on one device, got {queries.dtype} on {queries.device} "
            f"and {passages.dtype} on {passages.device}"
        )
    if positives.shape != (len(queries),) or positives.dtype != torch.int64:
        raise ValueError(f"expected {len(queries)} int64 positives, got {tuple(positives.shape)} {positives.dtype}")
    first, last = torch.stack(positives.aminmax()).tolist()  # one wait for a GPU, not two
    if first < least or last >= len(passages):
        raise ValueError(f"positives name columns {first}..{last} of {len(passages)}")
    if min(dims) < 1 or max(dims) > queries.shape[1] or len(set(dims)) != len(dims):
        raise ValueError(f"dims={list(dims)}: expected different numbers from 1 to {queries.shape[1]}")
    if len(weights) != len(dims):
        raise ValueError(f"dim_weights={list(weights)}: expected one for each of dims={list(dims)}")


def _check_options(
    queries: torch.Tensor,
    passages: torch.Tensor,
    temperature: float | torch.Tensor,
    passage_ids: torch.Tensor | None,
    excluded_ids: torch.Tensor | None,
    teacher: TeacherMargin | None,
    distillation: Distillation | None,
    backend: str,
) -> None:
    rows, columns = len(queries), len(passages)
    value = float(temperature.detach() if isinstance(temperature, torch.Tensor) else temperature)
    if not value > 0:
        raise ValueError(f"temperature={value}: expected more than 0")
    if passage_ids is not None and passage_ids.shape != (columns,):
        raise ValueError(f"expected {columns} passage ids, got {tuple(passage_ids.shape)}")
    if excluded_ids is not None and (passage_ids is None or excluded_ids.ndim != 2 or len(excluded_ids) != rows):
        raise ValueError(f"expected excluded_ids {rows} × E beside passage_ids, got {tuple(excluded_ids.shape)}")
    if teacher is not None and (len(teacher.queries), len(teacher.passages)) != (rows, columns):
        raise ValueError(
            f"expected {rows} and {columns} vectors of the teacher, got {len(teacher.queries)}, {len(teacher.passages)}"
        )
    if distillation is not None:
        named = distillation.columns
        if named.ndim != 2 or len(named) != rows or named.shape != distillation.scores.shape:
            raise ValueError(f"expected own passages {rows} × C and as many scores, got {tuple(named.shape)}")
        if named.numel() and int(named.max()) >= columns:
            raise ValueError(f"own passages name column {int(named.max())} of {columns}")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: expected one of {', '.join(BACKENDS)}")
    if backend.startswith("triton") and not queries.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"backend={backend!r}: the vectors are on {queries.device}, expected CUDA")
