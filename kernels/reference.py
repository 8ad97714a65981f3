"""The oracle: InfoNCE for every Matryoshka dim, one dim after another, eager, in float64.

As plain as possible; every backend is tested against it. Not meant for training.
Shapes: B queries, N passages, K components.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy, normalize


def info_nce_reference(
    queries_BK: torch.Tensor,
    passages_NK: torch.Tensor,
    positives_B: torch.Tensor,
    temperature: float,
    dims: Sequence[int],
    dim_weights: Sequence[float],
    passage_ids_N: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (loss, per-dim losses M) in float64, differentiable (van den Oord et al. 2018, eq. 4)."""
    masked_BN = columns_to_mask(positives_B, passages_NK.shape[0], passage_ids_N)
    losses = []
    for dim in dims:
        query_unit = normalize(queries_BK[:, :dim].double(), dim=1)
        passage_unit = normalize(passages_NK[:, :dim].double(), dim=1)
        scores_BN = query_unit @ passage_unit.T / temperature
        losses.append(cross_entropy(scores_BN.masked_fill(masked_BN, -torch.inf), positives_B))
    per_dim = torch.stack(losses)
    return (per_dim * per_dim.new_tensor(list(dim_weights))).sum(), per_dim.detach()


def columns_to_mask(positives_B: torch.Tensor, columns: int, passage_ids_N: torch.Tensor | None) -> torch.Tensor:
    """B × N, true where a column holds the positive's document under another column."""
    if passage_ids_N is None:
        return torch.zeros(len(positives_B), columns, dtype=torch.bool, device=positives_B.device)
    same_BN = passage_ids_N.unsqueeze(0) == passage_ids_N[positives_B].unsqueeze(1)
    return same_BN.scatter(1, positives_B.unsqueeze(1), False)
