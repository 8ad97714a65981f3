"""The distillation term: a teacher's scores over each query's own passages.

Plain PyTorch for every backend: its B × C scores are few beside the B × N of the contrastive term.
Shapes: B queries, C own passages, K components.
"""

from __future__ import annotations

import torch

from drama_dist.kernels.problem import Distillation, Problem


def distillation_loss(
    queries_BK: torch.Tensor,
    passages_NK: torch.Tensor,
    temperature: torch.Tensor | float,
    problem: Problem,
    teacher: Distillation,
) -> torch.Tensor:
    """Σ_d w_d · mean_i KL(softmax(teacher's scores) ‖ softmax(S^d)), over the own passages (Hinton et al. 2015).

    A query without own passages adds nothing. Computes in float32 at least.
    """
    precision = torch.promote_types(queries_BK.dtype, torch.float32)
    absent_BC = teacher.columns < 0
    own_BCK = passages_NK[teacher.columns.clamp_min(0)].to(precision)
    query_BK = queries_BK.to(precision)
    wanted_BC = _log_softmax(teacher.scores.to(precision), absent_BC)
    total = query_BK.new_zeros(())
    for dim, weight in zip(problem.dims, problem.weights, strict=True):
        query_unit = torch.nn.functional.normalize(query_BK[:, :dim], dim=1)
        own_unit = torch.nn.functional.normalize(own_BCK[:, :, :dim], dim=2)
        found_BC = _log_softmax(torch.einsum("bk,bck->bc", query_unit, own_unit) / temperature, absent_BC)
        divergence_B = (wanted_BC.exp() * (wanted_BC - found_BC)).masked_fill(absent_BC, 0).sum(1)
        total = total + weight * divergence_B.mean()
    return total


def _log_softmax(scores_BC: torch.Tensor, absent_BC: torch.Tensor) -> torch.Tensor:
    # Finite, so that a row of nothing but absent passages has no NaN gradient.
    return scores_BC.masked_fill(absent_BC, -1e30).log_softmax(1)
