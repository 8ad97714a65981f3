"""What a rank sends in a training step, by kind: the loss's vectors, and DeepSpeed's weights and gradients.

Leaves out the figures that ranks exchange: some hundred bytes, and one figure a query. Kinds, and how a collective is
counted, are those of ranks.take_traffic: (W − 1) parts for all-gather and reduce-scatter, 2 (W − 1) / W for all-reduce.
"""

from __future__ import annotations

from drama_dist.plan.cost import SINGLE, StepCost, largest_share

DEEPSPEED = ("weight gradients", "weights")  # kinds that ranks.py does not count


def traffic_per_step(cost: StepCost) -> dict[str, int]:
    """Bytes by kind that the rank sends; nothing where it is alone."""
    if cost.ranks == 1:
        return {}
    queries, passages = cost.batch
    gathered = queries if cost.gathers_queries else passages
    share, vector = largest_share(gathered, cost.ranks), SINGLE * cost.vector_size
    there, back = (cost.ranks - 1) * share * vector, (gathered - share) * vector
    if not cost.gathers_queries:
        return {"passages": there, "passage gradients": back} | _deepspeed(cost)
    merged = SINGLE * queries * (1 + 3 * len(cost.encoder.dims))  # the best score; each dim's maximum, two sums
    rows = {"merged rows": _all_reduce(merged, cost.ranks)}
    return {"queries": there, "query gradients": back} | rows | _deepspeed(cost)


def _deepspeed(cost: StepCost) -> dict[str, int]:
    """DeepSpeed 0.19.8: stages 1 and 2 all-reduce buckets too, and keep a part; weights are gathered after the update.

    Stage 3 gathers the weights for the first forward pass, and again for the backward pass, and scatters gradients;
    between chunks it keeps them.
    """
    weights = cost.weight_size * cost.parameters
    part = (cost.ranks - 1) * weights // cost.ranks
    if cost.train.zero_stage == 3:
        return {"weight gradients": part, "weights": 2 * part}
    return {"weight gradients": _all_reduce(weights, cost.ranks)} | ({"weights": part} if cost.train.zero_stage else {})


def _all_reduce(count: int, ranks: int) -> int:
    return 2 * (ranks - 1) * count // ranks
