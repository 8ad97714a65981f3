"""What a step costs by its shapes, against modules, graphs and hand values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from drama_dist.distributed.engine import Engine, OptimiserSettings
from drama_dist.encoder.backbone import Encoder, load
from drama_dist.kernels import select_backend
from drama_dist.plan.cost import SINGLE, Costs, RankShare, Shape, Way, layers_fuse
from drama_dist.plan.traffic import traffic_per_step
from drama_dist.train.grad_cache import GradCache

SHAPE = Shape(vocabulary=1000, hidden=64, layers=2, heads=1, key_value_heads=1, head=64, inner=96)
SHARE = RankShare(
    2, queries=7, passages=20, own_queries=4, own_passages=10, lengths=(8,) * 14, words=100, dims=(64, 32)
)
WAY = Way(
    size=2,
    zero=1,
    offload=False,
    chunk_tokens=32,
    budget=0,
    checkpoint_layers=False,
    queries_travel=False,
    loss=select_backend(torch.device("cpu"), torch.float64),
    fused=False,
    bucket=1000,
    threads=1,
)
COSTS = Costs(SHAPE, SHARE, WAY)


def shape_of(encoder: Encoder) -> Shape:
    config = encoder.backbone.config
    heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    return Shape(config.vocab_size, config.hidden_size, config.num_hidden_layers, *heads, config.intermediate_size)


@pytest.mark.parametrize("model", ["llm", "fusing_llm"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_parameters_and_kept_bytes_are_those_of_a_real_encoder(
    model: str, dtype: str, checkpointed: bool, request: pytest.FixtureRequest
) -> None:
    encoder = load(request.getfixturevalue(model))
    shape = shape_of(encoder)
    assert shape.parameters == sum(weight.numel() for weight in encoder.parameters())
    engine = Engine(encoder, OptimiserSettings(dtype, 1, 0.0, 1.0))
    encoder.train()
    if checkpointed:
        encoder.checkpoint_layers()
    cache = GradCache(encoder, engine, 608, 1e12)
    texts = [torch.randint(2, shape.vocabulary, (304,)).tolist() for _ in range(2)]
    cache.encode(texts)
    way = replace(WAY, size=4 if dtype == "float32" else 2, checkpoint_layers=checkpointed, fused=layers_fuse(shape))
    planned = Costs(shape, replace(SHARE, lengths=(304, 304)), way).graph_bytes
    assert cache.held_bytes / 608 == pytest.approx(planned, rel=1e-4)
    other = Costs(replace(shape, layers=shape.layers + 1), SHARE, way).graph_bytes
    assert cache.held_bytes / 608 != pytest.approx(other, rel=0.05)


def test_chunks_are_kept_as_far_as_the_budget_goes() -> None:
    assert COSTS.chunks == [32, 32, 32, 16]
    some = replace(COSTS, way=replace(WAY, budget=70 * COSTS.graph_bytes))
    assert some.kept == [True, True, False, False] and some.recomputed_tokens == 48
    assert COSTS.recomputed_tokens == COSTS.tokens == 112


def test_zero_stages_split_what_they_should() -> None:
    count = SHAPE.parameters
    held = {stage: replace(COSTS, way=replace(WAY, zero=stage)).state for stage in (1, 2, 3)}
    assert held[1] == held[2] == {"weights": 2 * count, "optimiser": 12 * count / 2}
    assert held[3]["weights"] == held[3]["gradients"] == 2 * count / 2
    whole = replace(COSTS, way=replace(WAY, zero=0, size=SINGLE)).state
    assert whole == {"weights": 4 * count, "optimiser": 8 * count}
    moved = replace(COSTS, way=replace(WAY, offload=True))
    assert moved.state["optimiser"] == 0 and moved.offloaded_bytes == 16 * count / 2


def test_traffic_by_hand() -> None:
    vector, count = 4 * 64, SHAPE.parameters
    weights = {"weight gradients": 2 * count, "weights": count}  # 2 (W − 1) / W and (W − 1) / W of 2 bytes each
    figures = 6 * 8 + 4 * 4 + 16 + 32 + 8  # counts, margins, loss and accuracy and dims, telemetry, masked
    sent = {"passages": 10 * vector, "passage gradients": 10 * vector, "figures": figures}
    assert traffic_per_step(COSTS) == sent | weights
    queries = replace(COSTS, way=replace(WAY, queries_travel=True))
    rows = 7 * 4 * (3 + 4)
    sent = {"queries": 4 * vector, "query gradients": 3 * vector, "merged rows": rows, "figures": 5 * 8 + 32 + 8}
    assert traffic_per_step(queries) == sent | weights
    assert traffic_per_step(replace(COSTS, share=replace(SHARE, ranks=1))) == {}


def test_operations_count_what_is_computed_again() -> None:
    products = SHAPE.layers * (4 * 64 * 64 + 3 * 64 * 96)
    attention = 4 * SHAPE.layers * 64 * 14 * 8 * 8
    forward = 2 * products * 112 + attention
    loss = 3 * 2 * 4 * 20 * 64
    assert COSTS.operations == 4 * forward + loss
    kept = replace(COSTS, way=replace(WAY, budget=1e9, checkpoint_layers=True))
    assert kept.operations == 4 * forward + loss
    assert replace(COSTS, way=replace(WAY, budget=1e9)).operations == 3 * forward + loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["eager", "cpu"])
def test_the_losss_memory_grows_with_columns_not_with_rows(dtype: torch.dtype) -> None:
    held = select_backend(torch.device("cpu"), dtype).held_bytes
    base = held(4096, 4096, (32, 64), 1)
    assert held(4096, 16384, (32, 64), 1) > 1.5 * base
    assert held(16384, 4096, (32, 64), 1) < 1.5 * base


def test_less_is_needed_with_no_kept_graphs_and_with_checkpoints() -> None:
    def peak(**changes: object) -> float:
        return sum(replace(COSTS, way=replace(WAY, **changes)).phases["backward"].values())  # type: ignore[arg-type]

    assert peak(budget=1e9) > peak(budget=0) > peak(budget=0, checkpoint_layers=True)
    assert peak(budget=0, chunk_tokens=8) < peak(budget=0)


def test_graphs_go_back_from_the_last_chunk() -> None:
    def graphs(tokens_kept: int) -> float:
        """Chunks have 32, 32, 32 and 16 tokens."""
        way = replace(WAY, budget=tokens_kept * COSTS.graph_bytes)
        return replace(COSTS, way=way).phases["backward"]["activations"] - COSTS.phases["backward"]["activations"]

    assert COSTS.chunks == [32, 32, 32, 16]
    assert graphs(16) == 0  # the last chunk's is gone before the others come
    assert graphs(32) == 32 * COSTS.graph_bytes
    assert graphs(64) == 64 * COSTS.graph_bytes
