"""How ranks share one loss over all their queries and passages: what is gathered, and whose gradients are whose.

Two partitions with equal results. Passages gathered: every rank has all passages and scores them for its own queries'
rows; the passages' gradients are summed back to their ranks. Queries gathered: every rank has all queries and scores
its own passages' columns; statistics of the rows are merged by the loss (as in vocabulary-parallel cross-entropy,
Shoeybi et al. 2019, section 3), and the queries' gradients are summed back. Gradients are those of the global batch's
loss, whatever the ranks. Which loss is the terms' business.
Shapes: as in term.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from drama_dist.distributed import ranks
from drama_dist.kernels import select_backend
from drama_dist.settings import TrainSettings


def prefers_queries(with_queries: float, with_passages: float, train: TrainSettings) -> bool:
    """Whether several ranks gather the queries and not the passages, from what either moves, in one unit.

    train.loss_partition="auto" takes what moves fewer bytes.
    """
    if train.loss_partition != "auto":
        return train.loss_partition == "queries"
    return with_queries < with_passages


def agreed_backend() -> str:
    """The backend of parts, which ranks merge chunk by chunk: each backend has its own chunks, so all take one.

    Eager where a rank has no other. A collective: every rank must ask for it.
    """
    name = select_backend(ranks.device(), torch.float32).name
    return "eager" if any(ranks.on_every_rank(int(name == "eager"))) else name


@dataclass(frozen=True)
class Share:
    """What this rank scores: leaves of a graph, and which rows and columns of the global batch they are.

    most_columns: of the largest rank's, where queries are gathered, so that the loss takes a part; else None.
    weight: of this rank's mean over its rows in the mean over all.
    """

    queries_BK: torch.Tensor
    passages_NK: torch.Tensor
    rows: slice
    columns: slice
    most_columns: int | None
    weight: float
    own_rows: int
    own_columns: int

    def gradients(self, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the global loss, for this rank's own queries and passages; `loss` is of the rows and columns above."""
        weighted = loss * self.weight if self.most_columns is None else loss
        query_gradient, passage_gradient = torch.autograd.grad(weighted, (self.queries_BK, self.passages_NK))
        if self.most_columns is None:
            return query_gradient, ranks.sum_to_owner(passage_gradient, self.own_columns, "passage gradients")
        return ranks.sum_to_owner(query_gradient, self.own_rows, "query gradients"), passage_gradient

    def mean(self, figures: torch.Tensor) -> list[float]:
        """Figures of the global batch, from means over the rows above."""
        if self.most_columns is None:
            figures = ranks.sum_over_ranks(figures * self.weight)
        values: list[float] = figures.tolist()
        return values


def share_of(queries_BK: torch.Tensor, passages_NK: torch.Tensor, gather_queries: bool) -> Share:
    """This rank's share of the loss, from its own queries and passages."""
    queries_BK, passages_NK = queries_BK.detach(), passages_NK.detach()
    own = len(queries_BK), len(passages_NK)
    if gather_queries:
        counts = ranks.on_every_rank(own[1])
        queries_BK = ranks.gather_rows(queries_BK, "queries")
        rows, columns, weight = slice(0, len(queries_BK)), _slice_of_this_rank(counts), 1.0
    else:
        counts = ranks.on_every_rank(own[0])
        passages_NK = ranks.gather_rows(passages_NK, "passages")
        rows, columns, weight = _slice_of_this_rank(counts), slice(0, len(passages_NK)), own[0] / sum(counts)
    return Share(
        queries_BK.requires_grad_(),
        passages_NK.requires_grad_(),
        rows,
        columns,
        max(counts) if gather_queries else None,
        weight,
        *own,
    )


def _slice_of_this_rank(counts: list[int]) -> slice:
    """Its rows among all ranks' rows, of which each rank has so many."""
    begin = sum(counts[: ranks.rank()])
    return slice(begin, begin + counts[ranks.rank()])
