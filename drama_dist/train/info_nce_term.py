"""InfoNCE as a term of the objective: the only place where the contrastive loss is called, shared over ranks.

How ranks share it is in partition.py, the loss itself in kernels/.
Shapes: M dims, R rows of a chunk; the others as in term.py.
"""

from __future__ import annotations

from functools import cached_property, partial

import torch

from drama_dist.distributed import ranks
from drama_dist.kernels import ColumnPart, InfoNCE, info_nce
from drama_dist.settings import EncoderSettings, TrainSettings
from drama_dist.train.partition import Share, agreed_backend, prefers_queries, share_of
from drama_dist.train.term import EmbeddedBatch, Relevance, TermResult


def gathers_queries(
    queries: int, passages: int, components: int, encoder: EncoderSettings, train: TrainSettings
) -> bool:
    """Whether several ranks gather the queries of a global batch of so many queries and passages, not the passages."""
    merged = 1 + 3 * len(encoder.dims)
    return prefers_queries(queries * (components + merged), passages * components, train)


class InfoNCETerm:
    """All ranks' queries against all ranks' passages, for every Matryoshka dim. See Term.

    Figures: per_dim, the loss of each dim; masked, how many (query, passage) pairs are neither positive nor negative;
    at the largest dim accuracy, the share of queries whose positive has the best score, and margin, the mean of the
    distribution `margins`: score(positive) − score(best negative) in units of 1/temperature, where there is a negative.
    """

    def __init__(self, encoder: EncoderSettings, train: TrainSettings, rounded: bool = False):
        """rounded: see `info_nce`."""
        self.encoder, self.train = encoder, train
        self._info_nce = partial(
            info_nce,
            temperature=train.temperature,
            dims=encoder.dims,
            dim_weights=train.dim_weights or None,
            rounded=rounded,
        )

    def __call__(self, batch: EmbeddedBatch) -> TermResult:
        relevance, components = batch.relevance, batch.queries_BK.shape[1]
        counts = len(relevance.positives_B), len(relevance.passage_ids_N)
        gather_queries = ranks.world_size() > 1 and gathers_queries(*counts, components, self.encoder, self.train)
        share = share_of(batch.queries_BK, batch.passages_NK, gather_queries)
        result = self._of_columns(share, relevance) if gather_queries else self._of_rows(share, relevance)
        query_gradient_BK, passage_gradient_NK = share.gradients(result.loss)
        means = share.mean(torch.cat([torch.stack([result.loss.detach(), result.accuracy]), result.per_dim]))
        margins_B = result.margins if gather_queries else ranks.gather_rows(result.margins, "figures")
        return self._result(query_gradient_BK, passage_gradient_NK, means, margins_B, result)

    @cached_property
    def _agreed_backend(self) -> str:
        return agreed_backend()

    def _of_rows(self, share: Share, relevance: Relevance) -> InfoNCE:
        """This rank's queries against all passages."""
        excluded_ids_BE = relevance.excluded_ids_BE
        return self._info_nce(
            share.queries_BK,
            share.passages_NK,
            relevance.positives_B[share.rows],
            passage_ids=relevance.passage_ids_N,
            excluded_ids=None if excluded_ids_BE is None else excluded_ids_BE[share.rows],
        )

    def _of_columns(self, share: Share, relevance: Relevance) -> InfoNCE:
        """All queries against this rank's passages."""
        positives_B, columns = relevance.positives_B, share.columns
        here_B = (positives_B >= columns.start) & (positives_B < columns.stop)
        assert share.most_columns is not None
        return self._info_nce(
            share.queries_BK,
            share.passages_NK,
            torch.where(here_B, positives_B - columns.start, -1),
            passage_ids=relevance.passage_ids_N[columns],
            excluded_ids=relevance.excluded_ids_BE,
            part=ColumnPart(relevance.passage_ids_N[positives_B], share.most_columns, _merge),
            backend=self._agreed_backend,
        )

    def _result(
        self,
        query_gradient_BK: torch.Tensor,
        passage_gradient_NK: torch.Tensor,
        global_figures: list[float],
        margins_B: torch.Tensor,
        result: InfoNCE,
    ) -> TermResult:
        loss, accuracy, *per_dim = global_figures
        margins = margins_B[~margins_B.isnan()]
        figures = {
            "per_dim": dict(zip(self.encoder.dims, per_dim, strict=True)),
            "accuracy": accuracy,
            "margin": float(margins.mean()) if len(margins) else 0.0,
            "masked": int(ranks.sum_over_ranks(result.masked)),
        }
        return TermResult(loss, query_gradient_BK, passage_gradient_NK, figures, {"margins": margins.tolist()})


def _merge(
    positive_MR: torch.Tensor, negatives_MR: torch.Tensor, best_R: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See ColumnPart."""
    dims, kind = len(positive_MR), "merged rows"
    largest = ranks.largest_over_ranks(torch.cat([negatives_MR, best_R.unsqueeze(0)]), kind)
    most_MR = largest[:dims].clamp_min(torch.finfo(largest.dtype).min)  # −inf − −inf is no number
    sums = ranks.sum_over_ranks(torch.cat([positive_MR, (negatives_MR - most_MR).exp()]), kind)
    return sums[:dims], most_MR + sums[dims:].log(), largest[-1]
