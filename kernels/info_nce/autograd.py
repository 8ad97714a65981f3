"""The autograd function of every loss and backend: what is done with a chunk's scores, and in which order.

Scores of every Matryoshka dim are snapshots of one product, and the gradients are computed in the forward pass, since
the upstream gradient is a scalar. The backend's tiles do the arithmetic on chunks of rows (see Tiles): what is held
beside the vectors is bounded by Backend.held_bytes.

Shapes: B queries, N passages, K components, M dims, R rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from drama_dist.kernels.info_nce.backends import NAMES, Backend, named_backend
from drama_dist.kernels.info_nce.problem import Problem
from drama_dist.kernels.info_nce.tiles import Tiles

_LARGE = 2.0**30  # squares of larger values, summed and inverted, leave float32's range
Outputs = tuple[torch.Tensor, ...]
P = TypeVar("P", bound=Problem)


def nested_loss(
    queries_BK: torch.Tensor,
    passages_NK: torch.Tensor,
    temperature: float,
    problem: P,
    backend: str,
    reference: Callable[[torch.Tensor, torch.Tensor, float, P], Outputs],
) -> Outputs:
    """(loss, per-dim losses, figures of the rows ...) of a loss by a backend's name; reference: that loss's oracle.

    Raises ValueError where the backend does not fit.
    """
    if backend not in NAMES:
        raise ValueError(f"backend={backend!r}: expected one of {', '.join(NAMES)}")
    if backend == "reference" and problem.part is not None:
        raise ValueError("backend='reference' takes no part: it needs all columns")
    with torch.autocast(queries_BK.device.type, enabled=False):
        if backend == "reference":
            return reference(queries_BK, passages_NK, temperature, problem)
        chosen = named_backend(backend, queries_BK.device, queries_BK.dtype)
        outputs: Outputs = NestedLoss.apply(queries_BK, passages_NK, temperature, problem, chosen)
        return outputs


class NestedLoss(torch.autograd.Function):
    """Forward returns what `nested_loss` does; only the loss has a gradient, of first order."""

    @staticmethod
    def forward(  # type: ignore[override]
        context: Any,
        queries_BK: torch.Tensor,
        passages_NK: torch.Tensor,
        temperature: float,
        problem: Problem,
        backend: Backend,
    ) -> Outputs:
        queries, query_powers = _in_range(queries_BK.detach())
        passages, passage_powers = _in_range(passages_NK.detach())
        tiles = backend.tiles(queries, passages, temperature, problem)
        context.loss, learns = problem.loss, any(context.needs_input_grad)
        most_columns = problem.most_columns(len(passages))
        chunks = backend.chunks(len(queries), most_columns, problem.dims, problem.teacher_components)
        outputs = _over_chunks(tiles, chunks, problem, learns)
        if learns:
            query_gradient, passage_gradient = tiles.gradients()
            context.save_for_backward(
                _rescaled(query_gradient, query_powers, queries_BK.dtype),
                _rescaled(passage_gradient, passage_powers, passages_NK.dtype),
            )
        context.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(context: Any, upstream: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{context.loss} has no second-order gradients: leave out create_graph, or say backend='reference'"
            )
        query_gradient, passage_gradient = context.saved_tensors
        return upstream * query_gradient, upstream * passage_gradient, None, None, None


def _over_chunks(tiles: Tiles, chunks: list[slice], problem: Problem, learns: bool) -> Outputs:
    """The function's outputs; where there is something to learn, the tiles take up the gradients."""
    losses, figures = [], []
    for chunk in chunks:
        rows = tiles.scores(chunk)
        if problem.part is not None:
            rows = rows.merged(problem.part.merge)
        if learns:
            tiles.add_gradients(*rows.shifts())
        losses.append(rows.losses_MR().sum(1))
        figures.append(rows.figures())
    per_dim_M = torch.stack(losses).sum(0) / chunks[-1].stop
    loss = (per_dim_M * per_dim_M.new_tensor(problem.weights)).sum()
    return loss, per_dim_M, *(torch.cat(of_chunks) for of_chunks in zip(*figures, strict=True))


def _in_range(vectors_RK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale rows that have very large values to values below 1, by powers of two, which does not change the scores.

    Returns the vectors and the powers, R × 1; the powers are None where no row was scaled.
    """
    precision = torch.promote_types(vectors_RK.dtype, torch.float32)
    # The norm of all vectors together is what is known fastest, and no value is larger.
    if not float(torch.linalg.vector_norm(vectors_RK, dtype=precision)) > _LARGE:
        return vectors_RK, None
    largest_R1 = torch.linalg.vector_norm(vectors_RK, torch.inf, dim=1, keepdim=True, dtype=precision)
    powers_R1 = torch.frexp(largest_R1).mantissa / largest_R1  # exact: a power of two can be represented
    powers_R1.masked_fill_(largest_R1 <= _LARGE, 1)
    return (vectors_RK * powers_R1).to(vectors_RK.dtype), powers_R1


def _rescaled(gradient_RK: torch.Tensor, powers_R1: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The gradient of what `_in_range` was given."""
    return (gradient_RK if powers_R1 is None else gradient_RK * powers_R1).to(dtype)
