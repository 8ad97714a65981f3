"""The public loss for distillation: a teacher's distribution over all passages as the target, for all Matryoshka dims.

Covers the result and its arguments. Knows nothing of ranks: the caller gathers and scales by its share of the rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from drama_dist.kernels.info_nce.arguments import check_sides, nested_dims
from drama_dist.kernels.info_nce.autograd import nested_loss
from drama_dist.kernels.info_nce.problem import ColumnPart, Distillation
from drama_dist.kernels.info_nce.reference import soft_targets_reference
from drama_dist.kernels.info_nce.teacher import TeacherScores


@dataclass(frozen=True)
class SoftTargets:
    """loss: differentiable scalar. per_dim: M mean divergences, in the order of dims. entropy: the mean entropy of the
    targets: what a cross-entropy with them would have as its least value.
    """

    loss: torch.Tensor
    per_dim: torch.Tensor
    entropy: torch.Tensor


def soft_targets(
    queries: torch.Tensor,
    passages: torch.Tensor,
    teacher: TeacherScores,
    *,
    temperature: float,
    dims: Sequence[int] | None = None,
    dim_weights: Sequence[float] | None = None,
    part: ColumnPart | None = None,
    rounded: bool = False,
    backend: str = "auto",
) -> SoftTargets:
    """Σ_d w_d · mean_i KL(t_i ‖ p^d_i), t_i the softmax of the teacher's logits over all passages, p^d_i that of S^d_i.

    S^d is the cosine of the first d components / temperature. The divergence of whole rankings is ListNet's top-one
    loss (Cao et al. 2007, section 5) less the targets' entropy.

    queries: B × K and passages: N × K, as `info_nce` takes them; temperature, dims and dim_weights too. teacher: on the
    same device; it gets no gradient.
    part: the passages, and the teacher's with its sparse columns, are some of the columns; the result is that over all
    parts, and so are the gradients of the passages. The gradients of the queries are its share: their sum over the
    parts is the whole.
    rounded, backend: as for `info_nce`. The teacher's product is in float32 at least, whatever the inputs' precision.
    Gradients are of first order only, but for the reference's.
    Raises ValueError where shapes, dtypes, dims, weights, the teacher, the temperature or the backend do not fit, and
    RuntimeError from a backward pass with create_graph.
    """
    check_sides(queries, passages, temperature)
    nested = nested_dims(dims, dim_weights, queries.shape[1])
    teacher.check(queries, passages)
    problem = Distillation(
        teacher=teacher.detached(), dims=nested.dims, weights=nested.weights, part=part, rounded=rounded
    )
    loss, per_dim, entropies = nested_loss(
        queries, passages, float(temperature), problem, backend, soft_targets_reference
    )
    return SoftTargets(loss, per_dim[nested.order], entropies.mean())
