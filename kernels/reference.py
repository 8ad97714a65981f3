"""The oracle: InfoNCE for every Matryoshka dim, one dim after another, eager, in float64.

As plain as possible; every backend is tested against it. Not meant for training.
Shapes: B queries, N passages, K components.
"""

from __future__ import annotations

import torch
from torch.nn.functional import normalize

from drama_dist.kernels.problem import Problem


def info_nce_reference(
    queries_BK: torch.Tensor,
    passages_NK: torch.Tensor,
    temperature: torch.Tensor | float,
    problem: Problem,
    precision: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (loss, per-dim losses M), differentiable (van den Oord et al. 2018, eq. 4).

    precision: of everything; less than float64 shows what plain PyTorch makes of the same inputs.
    """
    everything = slice(0, len(queries_BK))
    masked_BN = problem.masked(everything, len(passages_NK))
    if masked_BN is None:
        masked_BN = queries_BK.new_zeros(len(queries_BK), len(passages_NK), dtype=torch.bool)
    at_positive = problem.positives_B.unsqueeze(1)
    not_negative_BN = masked_BN.scatter(1, at_positive, True)
    losses = []
    for dim in problem.dims:
        query_unit = normalize(queries_BK[:, :dim].to(precision), dim=1)
        passage_unit = normalize(passages_NK[:, :dim].to(precision), dim=1)
        cosine_BN = query_unit @ passage_unit.T
        score_BN = cosine_BN / temperature
        own_B1 = score_BN.gather(1, at_positive)
        rivals_BN = (score_BN + problem.hardness * cosine_BN.detach()).masked_fill(not_negative_BN, -torch.inf)
        loss = (rivals_BN.scatter(1, at_positive, own_B1).logsumexp(1) - own_B1[:, 0]).mean()
        if problem.symmetric:
            # Row i: the scores of column y(i) for every query, query i's own in place i.
            rivals_BB = rivals_BN.T[problem.positives_B].diagonal_scatter(own_B1[:, 0])
            loss = loss + problem.symmetric * (rivals_BB.logsumexp(1) - own_B1[:, 0]).mean()
        losses.append(loss)
    per_dim = torch.stack(losses)
    return (per_dim * per_dim.new_tensor(problem.weights)).sum(), per_dim.detach()
