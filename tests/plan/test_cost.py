"""What a step costs by its shapes, against modules, graphs and hand values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from drama_dist.distributed.engine import Engine, OptimiserSettings
from drama_dist.encoder.backbone import load
from drama_dist.kernels import select_backend
from drama_dist.plan.cost import StepCost
from drama_dist.plan.devices import CPU, SHEETS, Device
from drama_dist.plan.traffic import traffic_per_step
from drama_dist.settings import EncoderSettings, TrainSettings
from drama_dist.train.grad_cache import GradCache

GPU = SHEETS["h100-80g"]
THIS_CPU = Device(CPU, 8e9, {"bfloat16": 1e11, "float32": 1e11}, None, "made up")
CONFIG = LlamaConfig(
    vocab_size=1000, hidden_size=64, num_hidden_layers=2, num_attention_heads=1, head_dim=64, intermediate_size=96
)
TRAIN = TrainSettings(
    batch_size=7,
    hard_negatives=13 / 7,
    chunk_tokens=32,
    activation_budget=0,
    dtype="bfloat16",
    loss_partition="passages",
)
COST = StepCost(CONFIG, EncoderSettings(dims=[64, 32]), TRAIN, 2, GPU, (8,) * 14, "made up")


def changed(cost: StepCost = COST, **train: Any) -> StepCost:
    return replace(cost, train=replace(cost.train, **train))


def keeping(tokens: int) -> StepCost:
    return changed(activation_budget=tokens * COST.graph_bytes / 2**30)


@pytest.mark.parametrize("model", ["llm", "fusing_llm"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_parameters_and_kept_bytes_are_those_of_a_real_encoder(
    model: str, dtype: str, checkpointed: bool, request: pytest.FixtureRequest
) -> None:
    encoder = load(request.getfixturevalue(model))
    config = encoder.backbone.config
    planned = changed(replace(COST, config=config, device=THIS_CPU), dtype=dtype, checkpoint_layers=checkpointed)
    assert planned.parameters == sum(weight.numel() for weight in encoder.parameters())
    engine = Engine(encoder, OptimiserSettings(dtype, 1, 0.0, 1.0))
    encoder.train()
    if checkpointed:
        encoder.checkpoint_layers()
    cache = GradCache(encoder, engine, 608, 1e12)
    cache.encode([torch.randint(2, config.vocab_size, (304,)).tolist() for _ in range(2)])
    assert cache.held_bytes / 608 == pytest.approx(planned.graph_bytes, rel=1e-4)
    deeper = LlamaConfig(**{**config.to_dict(), "num_hidden_layers": config.num_hidden_layers + 1})
    assert cache.held_bytes / 608 != pytest.approx(replace(planned, config=deeper).graph_bytes, rel=0.05)


def test_chunks_are_kept_as_far_as_the_budget_goes() -> None:
    assert COST.chunks == [32, 32, 32, 16] and COST.kept_tokens == 0
    assert keeping(31).kept_tokens == 16  # the last chunk's
    assert keeping(70).kept_tokens == 64
    assert changed(activation_budget="auto").kept_tokens == COST.tokens == 112


def test_zero_stages_split_what_they_should() -> None:
    count = COST.parameters
    held = {stage: changed(zero_stage=stage).state for stage in (1, 2, 3)}
    assert +held[1] == +held[2] == {"weights": 2 * count, "optimiser": 12 * count / 2}
    assert held[3]["weights"] == held[3]["gradients"] == 2 * count / 2
    assert +changed(zero_stage=0, dtype="float32").state == {"weights": 4 * count, "optimiser": 8 * count}
    moved = changed(offload_optimizer=True)
    assert moved.state["optimiser"] == 0 and moved.offloaded_bytes == 16 * count / 2


def test_traffic_by_hand() -> None:
    vector, count = 4 * 64, COST.parameters
    weights = {"weight gradients": 2 * count, "weights": count}  # 2 (W − 1) / W and (W − 1) / W of 2 bytes each
    assert traffic_per_step(COST) == {"passages": 10 * vector, "passage gradients": 10 * vector} | weights
    sent = {"queries": 4 * vector, "query gradients": 3 * vector, "merged rows": 7 * 4 * (3 + 4)}
    assert traffic_per_step(changed(loss_partition="queries")) == sent | weights
    assert traffic_per_step(replace(COST, ranks=1)) == {}


def test_regressions_head_and_longer_vectors_count() -> None:
    headed = replace(changed(regression_weight=1.0), encoder=EncoderSettings(dims=[96, 32]))
    more = 96 * 64 + 96
    assert headed.parameters == COST.parameters + more
    assert headed.state["optimiser"] == COST.state["optimiser"] + 12 * more / 2
    assert headed.phases["loss"]["embeddings"] - COST.phases["loss"]["embeddings"] == 4 * 4 * 14 * (96 - 64)
    assert headed.phases["backward"]["gradients"] - COST.phases["backward"]["gradients"] == 2 * more
    sent = traffic_per_step(headed)
    assert sent["passages"] == 10 * 4 * 96 and sent["weight gradients"] == 2 * headed.parameters


def test_operations_count_what_is_computed_again() -> None:
    products = 2 * (4 * 64 * 64 + 3 * 64 * 96)
    attention = 4 * 2 * 64 * 14 * 8 * 8
    forward = 2 * products * 112 + attention
    loss = 3 * 2 * 4 * 20 * 64
    assert COST.operations == 4 * forward + loss
    assert changed(keeping(112), checkpoint_layers=True).operations == 4 * forward + loss
    assert keeping(112).operations == 3 * forward + loss


@pytest.mark.parametrize(("device", "rows"), [("cpu", 4096), ("cuda", 32768)])
def test_the_losss_memory_grows_with_columns_not_with_rows(device: str, rows: int) -> None:
    """From so many rows on that their scores of 4,096 columns exceed a chunk: below, a backend takes all at once."""
    held = select_backend(torch.device(device), torch.float32).held_bytes
    base = held(rows, 4096, (32, 64), 1)
    assert held(rows, 16384, (32, 64), 1) > 1.5 * base
    assert held(4 * rows, 4096, (32, 64), 1) < 1.5 * base


def test_less_is_needed_with_no_kept_graphs_and_with_checkpoints() -> None:
    def peak(**settings: Any) -> int:
        return changed(**settings).phases["backward"].total()

    assert peak(activation_budget=1) > peak() > peak(checkpoint_layers=True)
    assert peak(chunk_tokens=8) < peak()


def test_graphs_are_those_kept_and_one_chunk_more_but_never_more_than_all() -> None:
    def graphs(cost: StepCost) -> float:
        return (cost.phases["backward"]["activations"] - COST.phases["backward"]["activations"]) / COST.graph_bytes

    assert graphs(keeping(32)) == 32
    assert graphs(keeping(64)) == 64
    assert graphs(keeping(112)) == 112 - 32  # the largest chunk's is in both


def test_only_the_cpus_allocator_keeps_what_the_backward_pass_has_freed() -> None:
    on_cpu = replace(COST, device=THIS_CPU)
    assert COST.phases["update"]["activations"] == changed(on_cpu, zero_stage=3).phases["update"]["activations"] == 0
    assert on_cpu.phases["update"]["activations"] == on_cpu.phases["backward"]["activations"] > 0
    assert on_cpu.peak[0] == "update"
