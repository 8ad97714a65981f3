"""The autograd function of every fused backend: what is done with a chunk's scores, and in which order.

Scores of every Matryoshka dim are snapshots of one product, and the gradients are computed in the
forward pass, since the upstream gradient is a scalar. The backend's tiles do the arithmetic on
chunks of rows (see Tiles), so that there is never a B × N matrix. The symmetric term needs every row
for its normalisers before the first gradient: it forms the scores once more.

Shapes: B queries, N passages, K components, M dims, R rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import softplus

from drama_dist.kernels.problem import Problem
from drama_dist.kernels.tiles import MASKED, Tiles

_EXACT = 50.0  # softplus(x) is x beyond it; PyTorch's own 20 errs by 2e-9


@dataclass(frozen=True)
class _Columns:
    """The symmetric term: by row for the positives, by column for the rest.

    shift_MN: exp(z − shift) is a negative's share of its column's losses.
    """

    losses_MB: torch.Tensor
    missed_MB: torch.Tensor
    shift_MN: torch.Tensor


class FusedInfoNCE(torch.autograd.Function):
    """Forward returns (loss, per-dim losses, margins, masked pairs); only the loss has a gradient."""

    @staticmethod
    def forward(  # type: ignore[override]
        context: torch.autograd.function.FunctionCtx,
        queries_BK: torch.Tensor,
        passages_NK: torch.Tensor,
        temperature: torch.Tensor,
        problem: Problem,
        backend: type[Tiles],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        tiles = backend(queries_BK.detach(), passages_NK.detach(), float(temperature.detach()), problem)
        columns = _column_pass(tiles, problem) if problem.symmetric else None
        learns = any(context.needs_input_grad)  # type: ignore[attr-defined]
        outputs = _row_pass(tiles, problem, columns, learns)
        if learns:
            found = tiles.gradients()
            context.save_for_backward(
                found.queries_BK.to(queries_BK.dtype),
                found.passages_NK.to(passages_NK.dtype),
                found.temperature.to(temperature),
            )
        context.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(context, upstream, *_):  # type: ignore[no-untyped-def, override]
        queries, passages, temperature = context.saved_tensors
        return upstream * queries, upstream * passages, upstream * temperature, None, None


def _column_pass(tiles: Tiles, problem: Problem) -> _Columns:
    """Normalisers of the symmetric term over all rows."""
    own = []
    for rows in tiles.row_chunks():
        own.append(tiles.scores(rows).own_MR)
        tiles.fold_columns()
    own_MB = torch.cat(own, 1)
    normaliser_MN = tiles.column_normalisers()
    rivals_MB = normaliser_MN[:, problem.positives_B]
    missed_MB = torch.sigmoid(rivals_MB - own_MB)
    losses_MN = torch.zeros_like(normaliser_MN).index_add_(1, problem.positives_B, missed_MB)
    shift_MN = torch.where(losses_MN > 0, normaliser_MN - losses_MN.log(), torch.inf)
    return _Columns(softplus(rivals_MB - own_MB, threshold=_EXACT), missed_MB, shift_MN)


def _row_pass(
    tiles: Tiles, problem: Problem, columns: _Columns | None, learns: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The function's outputs; where there is something to learn, the tiles take up the gradients."""
    losses, margins, masked = [], [], []
    for rows in tiles.row_chunks():
        found = tiles.scores(rows)
        own_MR, rivals_MR, best_R = found.own_MR, found.rivals_MR, found.best_R
        if problem.part is not None:
            own_MR, rivals_MR, best_R = problem.part.merge(own_MR, rivals_MR, best_R)
        losses_MR = softplus(rivals_MR - own_MR, threshold=_EXACT)
        missed_MR = torch.sigmoid(rivals_MR - own_MR)
        if columns is not None:
            losses_MR = losses_MR + problem.symmetric * columns.losses_MB[:, rows]
            missed_MR = missed_MR + problem.symmetric * columns.missed_MB[:, rows]
        if learns:
            shift_MR = torch.logaddexp(rivals_MR, own_MR)
            tiles.add_gradients(shift_MR, missed_MR, None if columns is None else columns.shift_MN)
        losses.append(losses_MR.sum(1))
        margins.append(torch.where(best_R > MASKED / 10, own_MR[-1] - best_R, torch.nan))
        masked.append(found.masked_pairs)
    per_dim_M = torch.stack(losses).sum(0) / len(problem.positives_B)
    loss = (per_dim_M * per_dim_M.new_tensor(problem.weights)).sum()
    return loss, per_dim_M, torch.cat(margins), torch.stack(masked).sum()
