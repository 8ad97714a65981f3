"""InfoNCE as a term of the objective: the only place where the contrastive loss is called, shared over ranks.

Two partitions with equal results. Passages gathered: every rank has all passages and scores them for its own queries'
rows; the passages' gradients are summed back to their ranks. Queries gathered: every rank has all queries and scores
its own passages' columns; the rows' log-sum-exps are merged (as in vocabulary-parallel cross-entropy, Shoeybi et al.
2019, section 3), and the queries' gradients are summed back. Gradients are those of the global batch's loss, whatever
the ranks. The loss itself is in kernels/.
Shapes: M dims, R rows of a chunk; the others as in term.py.
"""

from __future__ import annotations

from functools import cached_property, partial

import torch

from drama_dist.distributed import ranks
from drama_dist.kernels import ColumnPart, InfoNCE, info_nce, select_backend
from drama_dist.settings import EncoderSettings, TrainSettings
from drama_dist.train.term import EmbeddedBatch, TermResult


def gathers_queries(
    queries: int, passages: int, components: int, encoder: EncoderSettings, train: TrainSettings
) -> bool:
    """Whether several ranks gather the queries of a global batch of so many queries and passages, not the passages.

    train.loss_partition="auto" takes what moves fewer bytes.
    """
    if train.loss_partition != "auto":
        return train.loss_partition == "queries"
    dims = len(encoder.dims)
    return queries * (components + 1 + 3 * dims) < passages * components


class InfoNCETerm:
    """All ranks' queries against all ranks' passages, for every Matryoshka dim. See Term.

    Figures: per_dim, the loss of each dim; masked, how many (query, passage) pairs are neither positive nor negative;
    at the largest dim accuracy, the share of queries whose positive has the best score, and margin, the mean of the
    distribution `margins`: score(positive) − score(best negative) in units of 1/temperature, where there is a negative.
    """

    def __init__(self, encoder: EncoderSettings, train: TrainSettings):
        self.encoder, self.train = encoder, train
        self._info_nce = partial(
            info_nce, temperature=train.temperature, dims=encoder.dims, dim_weights=train.dim_weights or None
        )

    def __call__(self, batch: EmbeddedBatch) -> TermResult:
        relevance, components = batch.relevance, batch.queries_BK.shape[1]
        counts = len(relevance.positives_B), len(relevance.passage_ids_N)
        if ranks.world_size() > 1 and gathers_queries(*counts, components, self.encoder, self.train):
            return self._with_queries_gathered(batch)
        return self._with_passages_gathered(batch)

    @cached_property
    def _agreed_backend(self) -> str:
        """The backend of parts, which ranks merge chunk by chunk: each backend has its own chunks, so all take one.

        Eager where a rank has no other. Every rank must ask for it.
        """
        name = select_backend(ranks.device(), torch.float32).name
        return "eager" if any(ranks.on_every_rank(int(name == "eager"))) else name

    def _with_passages_gathered(self, batch: EmbeddedBatch) -> TermResult:
        relevance, excluded_ids_BE = batch.relevance, batch.relevance.excluded_ids_BE
        counts = ranks.on_every_rank(len(batch.queries_BK))
        rows = _slice_of_this_rank(counts)
        queries_BK = batch.queries_BK.detach().requires_grad_()
        passages_NK = ranks.gather_rows(batch.passages_NK.detach(), "passages").requires_grad_()
        result = self._info_nce(
            queries_BK,
            passages_NK,
            relevance.positives_B[rows],
            passage_ids=relevance.passage_ids_N,
            excluded_ids=None if excluded_ids_BE is None else excluded_ids_BE[rows],
        )
        share = len(queries_BK) / sum(counts)
        query_gradient_BK, passage_gradient_NK = torch.autograd.grad(result.loss * share, (queries_BK, passages_NK))
        figures = torch.cat([torch.stack([result.loss.detach(), result.accuracy]), result.per_dim])
        return self._result(
            query_gradient_BK,
            ranks.sum_to_owner(passage_gradient_NK, len(batch.passages_NK), "passage gradients"),
            ranks.sum_over_ranks(figures * share).tolist(),
            ranks.gather_rows(result.margins, "figures"),
            result,
        )

    def _with_queries_gathered(self, batch: EmbeddedBatch) -> TermResult:
        relevance = batch.relevance
        counts = ranks.on_every_rank(len(batch.passages_NK))
        columns = _slice_of_this_rank(counts)
        queries_BK = ranks.gather_rows(batch.queries_BK.detach(), "queries").requires_grad_()
        passages_NK = batch.passages_NK.detach().requires_grad_()
        positives_B = relevance.positives_B
        here_B = (positives_B >= columns.start) & (positives_B < columns.stop)
        result = self._info_nce(
            queries_BK,
            passages_NK,
            torch.where(here_B, positives_B - columns.start, -1),
            passage_ids=relevance.passage_ids_N[columns],
            excluded_ids=relevance.excluded_ids_BE,
            part=ColumnPart(relevance.passage_ids_N[positives_B], max(counts), _merge),
            backend=self._agreed_backend,
        )
        query_gradient_BK, passage_gradient_NK = torch.autograd.grad(result.loss, (queries_BK, passages_NK))
        return self._result(
            ranks.sum_to_owner(query_gradient_BK, len(batch.queries_BK), "query gradients"),
            passage_gradient_NK,
            [float(result.loss.detach()), float(result.accuracy), *result.per_dim.tolist()],
            result.margins,
            result,
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


def _slice_of_this_rank(counts: list[int]) -> slice:
    """Its rows among all ranks' rows, of which each rank has so many."""
    begin = sum(counts[: ranks.rank()])
    return slice(begin, begin + counts[ranks.rank()])
