"""The turn of the targets' components after which prefixes rank passages as whole vectors do.

Covers how the turn is learnt; target_space.py applies it. Principal axes, from which it starts, keep the most of the
vectors' length in a prefix, but much of that is common to all passages and says nothing of their order. The turn is
learnt without labels, as Matryoshka-Adaptor's map (Yoon et al. 2024) is: the softmax of a query's scores in each prefix
is to be that of its scores in whole vectors. A turn leaves the scores of whole vectors as they are.
Shapes: n texts, B queries and N passages of a step, K components.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn.functional import kl_div, log_softmax, normalize
from torch.nn.utils.parametrizations import orthogonal

from drama_dist.run.progress import progress_bar

# How these were chosen: benchmarks/results/recipe.md.
_TEMPERATURE = 0.05
_STEPS = 200
_LEARNING_RATE = 3e-3  # at first, falling linearly
_QUERIES = 64  # of a step
_PASSAGES = 4096


def nested_turn(queries_nK: np.ndarray, passages_nK: np.ndarray, dims: Sequence[int], seed: int) -> np.ndarray:
    """Orthogonal, float32 (K, K), to be multiplied from the right; the identity where no dims are below K.

    queries_nK, passages_nK: unit vectors, float32.
    """
    components = queries_nK.shape[1]
    shorter = [dim for dim in dims if dim < components]
    if not shorter:
        return np.eye(components, dtype=np.float32)
    chance = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):  # a Linear draws weights, on rank 0 alone
        turn = orthogonal(nn.Linear(components, components, bias=False), orthogonal_map="cayley")
    turn.weight = torch.eye(components)
    optimizer = torch.optim.Adam(turn.parameters(), _LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, _STEPS)
    bar = progress_bar(_STEPS, "targets: nested axes", "steps")
    for _ in range(_STEPS):
        queries_BK, passages_NK = _drawn(queries_nK, _QUERIES, chance), _drawn(passages_nK, _PASSAGES, chance)
        whole_BN = _log_shares(queries_BK, passages_NK)
        turn_KK = turn.weight.T
        turned_BK, turned_NK = queries_BK @ turn_KK, passages_NK @ turn_KK
        prefixes = [_log_shares(normalize(turned_BK[:, :dim]), normalize(turned_NK[:, :dim])) for dim in shorter]
        divergences = [kl_div(prefix_BN, whole_BN, reduction="batchmean", log_target=True) for prefix_BN in prefixes]
        optimizer.zero_grad()
        torch.stack(divergences).sum().backward()
        optimizer.step()
        schedule.step()
        bar.update()
    bar.close()
    return turn.weight.detach().T.contiguous().numpy()


def _drawn(vectors_nK: np.ndarray, count: int, chance: np.random.Generator) -> torch.Tensor:
    rows = chance.choice(len(vectors_nK), min(count, len(vectors_nK)), replace=False)
    return torch.from_numpy(vectors_nK[rows])


def _log_shares(queries_BD: torch.Tensor, passages_ND: torch.Tensor) -> torch.Tensor:
    return log_softmax(queries_BD @ passages_ND.T / _TEMPERATURE, dim=1)
