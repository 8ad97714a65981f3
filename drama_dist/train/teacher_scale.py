"""Raw scores of a dense teacher and of BM25 to the logits that the soft targets take: per query normalised and mixed.

Covers the scales alone, in closed form: no B × N matrix is formed. A softmax does not see what is added to all scores
of a query, so means are not subtracted.
Shapes: B queries, N passages, T components of the teacher, Z entries of the sparse scores.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from drama_dist.distributed import ranks
from drama_dist.kernels import SparseLogits, TeacherScores

_ROWS = 4096  # that are in float64 at a time
_FLAT = 1e-6  # deviations up to this share of the scores' bound are rounding: such scores say nothing


@dataclass(frozen=True)
class PassageMoments:
    """Of a teacher's vectors of passages: how many there are, their sum, and the sum of their outer products."""

    count: int
    sum_T: torch.Tensor
    products_TT: torch.Tensor

    def over_ranks(self) -> PassageMoments:
        """Of all ranks' passages; every rank must ask for it."""
        flat = torch.cat([self.sum_T.new_tensor([self.count]), self.sum_T, self.products_TT.flatten()])
        count, sum_T, products = ranks.sum_over_ranks(flat, "teacher").split([1, len(self.sum_T), len(self.sum_T) ** 2])
        return PassageMoments(int(count), sum_T, products.view_as(self.products_TT))

    def deviations(self, queries_BT: torch.Tensor) -> torch.Tensor:
        """B, float64: of each query's scores over these passages; 0 where they are all the same."""
        queries_BT = queries_BT.double()
        mean_T = self.sum_T / self.count
        covariance_TT = self.products_TT / self.count - torch.outer(mean_T, mean_T)
        deviation_B = ((queries_BT @ covariance_TT) * queries_BT).sum(1).clamp_min(0).sqrt()
        bound_B = queries_BT.norm(dim=1) * (self.products_TT.trace() / self.count).sqrt()
        return torch.where(deviation_B > _FLAT * bound_B, deviation_B, 0)


def passage_moments(passages_NT: torch.Tensor) -> PassageMoments:
    """Of these passages, float64."""
    components = passages_NT.shape[1]
    sum_T = passages_NT.new_zeros(components, dtype=torch.float64)
    products_TT = passages_NT.new_zeros(components, components, dtype=torch.float64)
    for some in passages_NT.split(_ROWS):
        some_RT = some.double()
        sum_T += some_RT.sum(0)
        products_TT += some_RT.T @ some_RT
    return PassageMoments(len(passages_NT), sum_T, products_TT)


def scaled_teacher(
    queries_BT: torch.Tensor,
    passages_NT: torch.Tensor,
    sparse: SparseLogits | None,
    weights: tuple[float, float],
    temperature: float,
    moments: PassageMoments | None = None,
) -> TeacherScores:
    """Logits (a · z(queries · passages) + b · z(sparse)) / temperature, but for shifts of whole rows.

    z is a query's scores less their mean, over their standard deviation, over all passages of the global batch; scores
    that are all the same become 0. For such mixes see Bruch et al. 2023 (arXiv 2210.11934).
    queries_BT, passages_NT: float32, raw. sparse: raw scores for all passages of the global batch, 0 where there is no
    entry. weights: a and b. moments: of the global batch's passages, by default of those given. Several dense teachers
    are scaled one by one, each with its weight, and their vectors joined end to end.
    Raises ValueError where the temperature is not more than 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: expected more than 0")
    moments = passage_moments(passages_NT) if moments is None else moments
    of_dense, of_sparse = (weight / temperature for weight in weights)
    scales_B1 = _over(of_dense, moments.deviations(queries_BT)).unsqueeze(1)
    if sparse is not None:
        scales_B = _over(of_sparse, _sparse_deviations(sparse, moments.count))
        values = sparse.values * scales_B[sparse.row_of_entries()]
        sparse = replace(sparse, values=values.float())
    return TeacherScores((queries_BT * scales_B1).float(), passages_NT, sparse)


def _over(factor: float, deviation_B: torch.Tensor) -> torch.Tensor:
    """factor / deviation, 0 where that is 0."""
    return torch.where(deviation_B > 0, factor / deviation_B, 0)


def _sparse_deviations(sparse: SparseLogits, count: int) -> torch.Tensor:
    """B, float64: of each row's values and zeros, `count` together; 0 where they are all the same."""
    rows, values = sparse.row_of_entries(), sparse.values.double()
    stored_B = sparse.starts.diff()

    def summed(each: torch.Tensor) -> torch.Tensor:
        return each.new_zeros(len(stored_B)).index_add_(0, rows, each)

    mean_B = summed(values) / count
    squares_B = summed((values - mean_B[rows]).square()) + (count - stored_B) * mean_B.square()
    bound_B = summed(values.square())
    return torch.where(squares_B > _FLAT**2 * bound_B, (squares_B / count).sqrt(), 0)
