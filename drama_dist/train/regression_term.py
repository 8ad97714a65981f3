"""Regression as a term of the objective: the distance of every vector from its target.

The loss of LEAF (Vujanic and Rueckstiess 2025, arXiv 2509.12539): the L2 norm of the difference of a vector and its
teacher's, both of length 1; here for every Matryoshka dim, with the target's prefix. What queries and passages weigh
does not depend on how many of each are in the batch. Where targets come from is in target_vectors.py.
Shapes: as in term.py; n = B + N of this rank.
"""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from drama_dist.distributed import ranks
from drama_dist.settings import EncoderSettings, TrainSettings
from drama_dist.train.term import EmbeddedBatch, TermResult


class RegressionTerm:
    """Σ weight · ‖vector − target‖ over the dims: (1 − w) of the mean over all ranks' queries, w of that over their
    passages, where w is what the batch's targets say that passages weigh.

    See Term. Figures: distance_per_dim, the same of each dim; distance_of_queries, distance_of_passages: at the largest
    dim.
    """

    def __init__(self, encoder: EncoderSettings, train: TrainSettings):
        self.dims = encoder.dims
        weights = train.dim_weights or [1.0] * len(encoder.dims)
        self.weights = [weight / sum(weights) for weight in weights]

    def __call__(self, batch: EmbeddedBatch) -> TermResult:
        """Raises ValueError where the batch has no targets."""
        if batch.targets is None:
            raise ValueError("regression: the batch has no targets")
        vectors_nK = torch.cat([batch.queries_BK, batch.passages_NK]).detach().requires_grad_()
        targets_nK = torch.cat([batch.targets.queries_BK, batch.targets.passages_NK])
        distances_Mn = torch.stack([_distances(vectors_nK[:, :dim], targets_nK[:, :dim]) for dim in self.dims])
        queries = len(batch.queries_BK)
        sums_Mk = torch.stack([part.sum(1) for part in distances_Mn.split([queries, len(vectors_nK) - queries], 1)], 1)
        counts_k = ranks.sum_over_ranks(sums_Mk.new_tensor([queries, len(vectors_nK) - queries]))
        weights_M = sums_Mk.new_tensor(self.weights)
        shares_k = sums_Mk.new_tensor([1 - batch.targets.passages_weigh, batch.targets.passages_weigh])
        loss = weights_M @ (sums_Mk / counts_k) @ shares_k
        (gradient_nK,) = torch.autograd.grad(loss, vectors_nK)
        means_Mk = ranks.sum_over_ranks(sums_Mk.detach()) / counts_k
        means_M = means_Mk @ shares_k
        of_queries, of_passages = means_Mk[self.dims.index(max(self.dims))].tolist()
        figures = {
            "distance_per_dim": dict(zip(self.dims, means_M.tolist(), strict=True)),
            "distance_of_queries": of_queries,
            "distance_of_passages": of_passages,
        }
        return TermResult(float(weights_M @ means_M), gradient_nK[:queries], gradient_nK[queries:], figures)


def _distances(vectors_nK: torch.Tensor, targets_nK: torch.Tensor) -> torch.Tensor:
    """n; the norm's gradient at a distance of 0 is 0, and so is it for a target of zeros, from which all are 1 away."""
    difference_nK = normalize(vectors_nK, dim=1) - normalize(targets_nK, dim=1)
    return torch.linalg.vector_norm(difference_nK, dim=1)
