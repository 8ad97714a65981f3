"""The oracle: each loss for every Matryoshka dim, one dim after another, in plain operations and float64.

Every backend is tested against it. Not meant for training: it holds several B × N matrices for each dim.
Shapes: B queries, N passages, K components, M dims.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from drama_dist.kernels.info_nce.problem import Contrast, Distillation
from drama_dist.kernels.info_nce.tiles import FLOOR


def info_nce_reference(
    queries_BK: torch.Tensor,
    passages_NK: torch.Tensor,
    temperature: float,
    problem: Contrast,
    precision: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (loss, per-dim losses M, margins B, masked pairs), the loss differentiable any number of times.

    precision: of everything; less than float64 shows what plain PyTorch makes of the same inputs.
    """
    masked_BN = problem.masked(slice(0, len(queries_BK)))
    if masked_BN is None:
        masked_BN = torch.zeros(len(queries_BK), len(passages_NK), dtype=torch.bool, device=queries_BK.device)
    at_positive = problem.positives_B.unsqueeze(1)
    not_negative_BN = masked_BN.scatter(1, at_positive, True)
    losses, margins = [], queries_BK.new_zeros(0)
    for score_BN in _scores(queries_BK, passages_NK, temperature, problem.dims, precision):
        positive_B = score_BN.gather(1, at_positive)[:, 0]
        losses.append((score_BN.masked_fill(masked_BN, -torch.inf).logsumexp(1) - positive_B).mean())
        margins = positive_B - score_BN.masked_fill(not_negative_BN, -torch.inf).amax(1)
    margins = margins.detach().masked_fill(margins.isinf(), torch.nan)
    return *_weighted(losses, problem.weights), margins, masked_BN.sum()


def soft_targets_reference(
    queries_BK: torch.Tensor,
    passages_NK: torch.Tensor,
    temperature: float,
    problem: Distillation,
    precision: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (loss, per-dim losses M, the targets' entropies B), as above."""
    log_target_BN = problem.teacher.logits(slice(0, len(queries_BK)), precision).log_softmax(1)
    target_BN = log_target_BN.exp()
    losses = []
    for score_BN in _scores(queries_BK, passages_NK, temperature, problem.dims, precision):
        losses.append((target_BN * (log_target_BN - score_BN.log_softmax(1))).sum(1).mean())
    return *_weighted(losses, problem.weights), -(target_BN * log_target_BN).sum(1)


def _scores(
    queries_BK: torch.Tensor, passages_NK: torch.Tensor, temperature: float, dims: Sequence[int], precision: torch.dtype
) -> Iterator[torch.Tensor]:
    """B × N, of one dim after another."""
    for dim in dims:
        query, passage = (_unit(side[:, :dim].to(precision)) for side in (queries_BK, passages_NK))
        yield query @ passage.T / temperature


def _weighted(losses: Sequence[torch.Tensor], weights: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum, and the losses without graph, M."""
    per_dim = torch.stack(list(losses))
    return (per_dim * per_dim.new_tensor(weights)).sum(), per_dim.detach()


def _unit(vectors_RK: torch.Tensor) -> torch.Tensor:
    """Rows at unit length; zeros, without gradient, for those not longer than FLOOR."""
    norms_R1 = vectors_RK.norm(dim=1, keepdim=True)
    return vectors_RK / norms_R1.masked_fill(norms_R1 <= FLOOR, torch.inf)
