"""The objective: the only place where the loss is called, shared over ranks, and reported.

Two partitions with equal results. Passages travel: every rank has all passages and owns its queries' rows; the
passages' gradients travel back. Queries travel: every rank has all queries and owns its passages' columns; the rows'
log-sum-exps are merged (as in vocabulary-parallel cross-entropy, Shoeybi et al. 2019, section 3), and the queries'
gradients travel back. Gradients are those of the global batch's loss, whatever the ranks.
Shapes: B own queries, N own passages, K components, M dims, R rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from drama_dist.distributed import ranks
from drama_dist.kernels import ColumnPart, InfoNCE, info_nce
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
    positives: torch.Tensor,
    passage_ids: torch.Tensor,
    encoder: EncoderSettings,
    train: TrainSettings,
) -> Objective:
    """InfoNCE of all ranks' queries against all ranks' passages.

    positives: of all ranks' queries, in order of rank, columns among the passages of all ranks, in order of rank;
    passage_ids: of all those columns, equal for equal texts. Embeddings come without graph, not normalised.
    """
    whole = ranks.world_size() == 1 or not queries_travel(
        len(positives), len(passage_ids), queries_BK.shape[1], encoder, train
    )
    partition = _passages_travel if whole else _queries_travel
    return partition(queries_BK.detach(), passages_NK.detach(), positives, passage_ids, encoder, train)


def queries_travel(
    queries: int, passages: int, components: int, encoder: EncoderSettings, train: TrainSettings
) -> bool:
    """Whether it is the queries of a global batch that travel between ranks: "auto" takes what moves fewer bytes."""
    if train.loss_partition != "auto":
        return train.loss_partition == "queries"
    dims = len(encoder.dims)
    return queries * (components + 1 + 3 * dims) < passages * components


def _passages_travel(
    queries_BK: torch.Tensor,
    passages_NK: torch.Tensor,
    positives: torch.Tensor,
    passage_ids: torch.Tensor,
    encoder: EncoderSettings,
    train: TrainSettings,
) -> Objective:
    counts = ranks.on_every_rank(len(queries_BK))
    queries = queries_BK.requires_grad_()
    passages = ranks.gather_rows(passages_NK, "passages").requires_grad_()
    own = positives[_own_rows(counts)]
    result = _loss(queries, passages, own, passage_ids, encoder, train)
    share = len(queries) / sum(counts)
    query_gradient, passage_gradient = torch.autograd.grad(result.loss * share, (queries, passages))
    figures = torch.cat([torch.stack([result.loss.detach(), _known(result.accuracy)]), result.per_dim])
    return _objective(
        query_gradient,
        ranks.sum_to_owner(passage_gradient, len(passages_NK), "passage gradients"),
        ranks.sum_over_ranks(figures * share).tolist(),
        ranks.gather_rows(_known(result.margins), "figures"),
        result,
        encoder,
    )


def _queries_travel(
    queries_BK: torch.Tensor,
    passages_NK: torch.Tensor,
    positives: torch.Tensor,
    passage_ids: torch.Tensor,
    encoder: EncoderSettings,
    train: TrainSettings,
) -> Objective:
    counts = ranks.on_every_rank(len(passages_NK))
    columns = _own_rows(counts)
    queries = ranks.gather_rows(queries_BK, "queries").requires_grad_()
    passages = passages_NK.requires_grad_()
    here = (positives >= columns.start) & (positives < columns.stop)
    own = torch.where(here, positives - columns.start, -1)
    part = ColumnPart(passage_ids[positives], max(counts), _merge)
    result = _loss(queries, passages, own, passage_ids[columns], encoder, train, part)
    query_gradient, passage_gradient = torch.autograd.grad(result.loss, (queries, passages))
    figures = [float(result.loss.detach()), float(_known(result.accuracy)), *result.per_dim.tolist()]
    return _objective(
        ranks.sum_to_owner(query_gradient, len(queries_BK), "query gradients"),
        passage_gradient,
        figures,
        _known(result.margins),
        result,
        encoder,
    )


def _merge(
    own_MR: torch.Tensor, rivals_MR: torch.Tensor, best_R: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ColumnPart."""
    dims, kind = len(own_MR), "merged rows"
    largest = ranks.largest_over_ranks(torch.cat([rivals_MR, best_R.unsqueeze(0)]), kind)
    most_MR = largest[:dims].clamp_min(torch.finfo(largest.dtype).min)  # −inf − −inf is no number
    sums = ranks.sum_over_ranks(torch.cat([own_MR, (rivals_MR - most_MR).exp()]), kind)
    return sums[:dims], most_MR + sums[dims:].log(), largest[-1]


def _loss(
    queries: torch.Tensor,
    passages: torch.Tensor,
    positives: torch.Tensor,
    passage_ids: torch.Tensor,
    encoder: EncoderSettings,
    train: TrainSettings,
    part: ColumnPart | None = None,
) -> InfoNCE:
    return info_nce(
        queries,
        passages,
        positives,
        temperature=train.temperature,
        dims=encoder.dims,
        dim_weights=train.dim_weights or None,
        passage_ids=passage_ids,
        part=part,
    )


def _own_rows(counts: list[int]) -> slice:
    begin = sum(counts[: ranks.rank()])
    return slice(begin, begin + counts[ranks.rank()])


def _known(figure: torch.Tensor | None) -> torch.Tensor:
    assert figure is not None  # only the reference backend leaves figures out
    return figure


def _objective(
    query_gradient_BK: torch.Tensor,
    passage_gradient_NK: torch.Tensor,
    figures: list[float],
    margins: torch.Tensor,
    result: InfoNCE,
    encoder: EncoderSettings,
) -> Objective:
    loss, accuracy, *per_dim = figures
    margins = margins[~margins.isnan()]
    return Objective(
        query_gradient_BK,
        passage_gradient_NK,
        loss,
        dict(zip(encoder.dims, per_dim, strict=True)),
        accuracy,
        float(margins.mean()) if len(margins) else 0.0,
        int(ranks.sum_over_ranks(_known(result.masked))),
        margins.tolist(),
    )
