"""What a rank sends in a training step, by kind, from shapes: the counterpart of ranks.take_traffic, to its bytes.

Covers the loss's exchange and figures as objective.py and telemetry.py ask for them, and weights and gradients, which
DeepSpeed sends and ranks.py does not count (DeepSpeed's own few figures are left out). A collective counts as in
ranks.py: (W − 1) parts for all-gather and reduce-scatter, 2 (W − 1) / W of the tensor for all-reduce.
"""

from __future__ import annotations

from collections import Counter

from drama_dist.plan.cost import INDEX, SINGLE, Costs

DEEPSPEED = ("weight gradients", "weights")  # kinds that ranks.py does not count
_FIGURES = 2  # loss and accuracy; beside them one loss a dim
_TELEMETRY = 4  # float64


def traffic_per_step(costs: Costs) -> dict[str, int]:
    """Bytes by kind that the rank sends in any step but the first; nothing where it is alone.

    The rank is one with the most chunks.
    """
    if costs.share.ranks == 1:
        return {}
    sent = Counter(_queries(costs) if costs.way.queries_travel else _passages(costs))
    ranks = costs.share.ranks
    questions = 2  # how long the longest text is; whether a signal has reached anybody
    if costs.way.zero == 3:
        questions += 1 + len(costs.chunks)  # how many chunks all must go through, and whether each is kept
    sent["figures"] += questions * INDEX * (ranks - 1)
    sent["figures"] += _all_reduce(8 * _TELEMETRY, ranks) + _all_reduce(INDEX, ranks)
    return {**sent, **_deepspeed(costs)}


def _passages(costs: Costs) -> dict[str, int]:
    share, ranks, vector = costs.share, costs.share.ranks, SINGLE * costs.shape.hidden
    margins = SINGLE * share.most_queries * (ranks - 1)
    figures = _all_reduce(SINGLE * (_FIGURES + len(share.dims)), ranks)
    return {
        "passages": (ranks - 1) * share.most_passages * vector,
        "passage gradients": (share.passages - share.own_passages) * vector,
        "figures": 4 * INDEX * (ranks - 1) + figures + margins,
    }


def _queries(costs: Costs) -> dict[str, int]:
    share, ranks, vector = costs.share, costs.share.ranks, SINGLE * costs.shape.hidden
    chunks = costs.way.loss.chunk_rows(share.queries, share.most_passages, share.dims)
    dims = len(share.dims)
    merged = [_all_reduce(SINGLE * rows * numbers, ranks) for rows in chunks for numbers in (dims + 1, 2 * dims)]
    return {
        "queries": (ranks - 1) * share.most_queries * vector,
        "query gradients": (share.queries - share.own_queries) * vector,
        "merged rows": sum(merged),
        "figures": 3 * INDEX * (ranks - 1),
    }


def _deepspeed(costs: Costs) -> dict[str, int]:
    """DeepSpeed 0.19.8: stages 1 and 2 all-reduce buckets too, and keep a part; weights are gathered after the update.

    Stage 3 gathers the weights for the first forward pass, and again for the backward pass, and scatters gradients;
    between chunks it keeps them.
    """
    ranks, bytes_of_weights = costs.share.ranks, costs.way.size * costs.shape.parameters
    part = (ranks - 1) * bytes_of_weights // ranks
    if costs.way.zero == 3:
        return {"weight gradients": part, "weights": 2 * part}
    gradients = _all_reduce(bytes_of_weights, ranks)
    return {"weight gradients": gradients} | ({"weights": part} if costs.way.zero else {})


def _all_reduce(count: int, ranks: int) -> int:
    return 2 * (ranks - 1) * count // ranks
