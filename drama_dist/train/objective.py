"""The objective: the only place where the loss is called, shared over ranks, and reported.

Passages travel: every rank sees all passages of the global batch and owns its queries' rows. The
sum over ranks of `loss` is the loss of the global batch, and so are the gradients.
Shapes: B own queries, N own passages, K components.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from drama_dist import ranks
from drama_dist.kernels import info_nce
from drama_dist.settings import EncoderSettings, TrainSettings


@dataclass(frozen=True)
class Objective:
    """Gradients of the own rows, and the global batch's figures.

    margins: score(positive) − score(best negative) in units of 1/temperature, of every query that has a negative.
    """

    query_gradient_BK: torch.Tensor
    passage_gradient_NK: torch.Tensor
    loss: float
    per_dim: dict[int, float]
    accuracy: float
    margin: float
    masked: int
    margins: list[float]


def contrastive_objective(
    queries_BK: torch.Tensor,
    passages_NK: torch.Tensor,
    positives_B: torch.Tensor,
    passage_ids: torch.Tensor,
    encoder: EncoderSettings,
    train: TrainSettings,
) -> Objective:
    """InfoNCE of the own queries against all ranks' passages.

    positives_B: columns among the passages of all ranks, in order of rank; passage_ids: of all those
    columns, equal for equal texts. Embeddings come without graph, not normalised.
    """
    queries = queries_BK.detach().requires_grad_()
    passages = ranks.gather_rows(passages_NK.detach()).requires_grad_()
    result = info_nce(
        queries,
        passages,
        positives_B,
        temperature=train.temperature,
        dims=encoder.dims,
        dim_weights=train.dim_weights or None,
        passage_ids=passage_ids,
    )
    assert result.accuracy is not None and result.margins is not None and result.masked is not None
    share = len(queries) / sum(ranks.on_every_rank(len(queries)))
    query_gradient, passage_gradient = torch.autograd.grad(result.loss * share, (queries, passages))
    figures = torch.cat([torch.stack([result.loss.detach(), result.accuracy]), result.per_dim])
    loss, accuracy, *per_dim = ranks.sum_over_ranks(figures * share).tolist()
    margins = ranks.gather_rows(result.margins)
    margins = margins[~margins.isnan()]
    return Objective(
        query_gradient,
        ranks.sum_to_owner(passage_gradient, len(passages_NK)),
        loss,
        dict(zip(encoder.dims, per_dim, strict=True)),
        accuracy,
        float(margins.mean()) if len(margins) else 0.0,
        int(ranks.sum_over_ranks(result.masked)),
        margins.tolist(),
    )
