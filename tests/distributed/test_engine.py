"""The optimiser step: against AdamW written out, and exact resumption."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from drama_dist.distributed.checkpoints import Checkpoints
from drama_dist.distributed.engine import Engine, OptimiserSettings, learning_rate_at


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 1))


def piece(model: nn.Module, step: int, part: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * step + part)
    rows = torch.randn(4, 5, generator=generator).to(next(model.parameters()).dtype)
    return 10 * model(rows).float().square().mean()


def run(engine: Engine, steps: range, save_at: int | None = None, saved: Checkpoints | None = None) -> list[float]:
    norms = []
    for step in steps:
        for part in range(3):
            engine.backward(piece(engine.module, step, part), last=part == 2)
        norms.append(engine.step(0.01))
        if step + 1 == save_at and saved is not None:
            engine.save(saved, save_at)
    return norms


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_steps_equal_adamw_with_clipping_and_decay_on_matrices_only(stage: int) -> None:
    engine = Engine(module(), OptimiserSettings("float32", stage, weight_decay=0.1, gradient_clipping=0.5))
    norms = run(engine, range(4))
    plain = module()
    matrices = [weight for weight in plain.parameters() if weight.ndim > 1]
    vectors = [weight for weight in plain.parameters() if weight.ndim == 1]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=0.01
    )
    for step, norm in enumerate(norms):
        optimiser.zero_grad()
        sum(piece(plain, step, part) for part in range(3)).backward()  # type: ignore[union-attr]
        assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(plain.parameters(), 0.5)), rel=1e-5)
        assert norm > 0.5
        optimiser.step()
    for name, weight in engine.full_weights().items():
        torch.testing.assert_close(weight, plain.state_dict()[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_embeddings_have_their_learning_rate(stage: int) -> None:
    def embedded() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(6, 5), nn.Linear(5, 1))

    def loss(model: nn.Module, step: int) -> torch.Tensor:
        return (model(torch.tensor([step, 1, 2])) - 3).square().mean()

    engine = Engine(embedded(), OptimiserSettings("float32", stage, 0.1, 1e9, embedding_rate=8.0))
    plain = embedded()
    embedding, *rest = plain.parameters()
    matrix, bias = rest
    optimiser = torch.optim.AdamW(
        [
            {"params": [embedding], "lr": 0.08, "weight_decay": 0.1},
            {"params": [matrix], "lr": 0.01, "weight_decay": 0.1},
            {"params": [bias], "lr": 0.01, "weight_decay": 0.0},
        ]
    )
    for step in range(3, 6):
        engine.backward(loss(engine.module, step), last=True)
        engine.step(0.01)
        optimiser.zero_grad()
        loss(plain, step).backward()
        optimiser.step()
    for name, weight in engine.full_weights().items():
        torch.testing.assert_close(weight, plain.state_dict()[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stages", [(1, 1), (2, 2), (1, 2), (3, 3), (2, 3), (3, 1)], ids=str)
def test_resuming_gives_the_same_weights(tmp_path: Path, stages: tuple[int, int], dtype: str) -> None:
    saved = Checkpoints(tmp_path, keep=1)
    first = Engine(module(), OptimiserSettings(dtype, stages[0], 0.1, 1.0))
    run(first, range(6), save_at=3, saved=saved)
    saved.wait()
    second = Engine(module(), OptimiserSettings(dtype, stages[1], 0.1, 1.0))
    assert second.resume(Checkpoints(tmp_path, keep=1))["step"] == 3
    run(second, range(3, 6))
    expected = first.full_weights()
    same = [torch.equal(weight, expected[name]) for name, weight in second.full_weights().items()]
    if stages[0] == stages[1]:
        assert all(same)
    for name, weight in second.full_weights().items():  # another stage adds a norm's squares in another order
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("restored", [True, False])
def test_resuming_goes_on_with_the_random_numbers_of_dropout(
    restored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_dropout() -> nn.Module:
        return nn.Sequential(nn.Dropout(0.5), *module())

    saved = Checkpoints(tmp_path, keep=1)
    first = Engine(with_dropout(), OptimiserSettings("float32", 1, 0.1, 1.0))
    run(first, range(6), save_at=3, saved=saved)
    saved.wait()
    if not restored:
        monkeypatch.setattr("drama_dist.distributed.engine._restore_random_state", lambda reader: None)
    second = Engine(with_dropout(), OptimiserSettings("float32", 1, 0.1, 1.0))
    second.resume(saved)
    run(second, range(3, 6))
    expected = first.full_weights()
    assert all(torch.equal(weight, expected[name]) for name, weight in second.full_weights().items()) == restored


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_stops_the_training(stage: int) -> None:
    stopped = Engine(module(), OptimiserSettings("float32", stage, 0.1, 1.0))
    stopped.backward(piece(stopped.module, 0, 0) * float("inf"), last=True)
    with pytest.raises(FloatingPointError, match=r"the gradient's norm is (inf|nan)"):
        stopped.step(0.01)


def test_a_plain_optimiser_goes_on_in_a_split_one(tmp_path: Path) -> None:
    saved = Checkpoints(tmp_path, keep=1)
    first = Engine(module(), OptimiserSettings("float32", 0, 0.1, 1.0))
    run(first, range(6), save_at=3, saved=saved)
    saved.wait()
    second = Engine(module(), OptimiserSettings("float32", 3, 0.1, 1.0))
    assert second.resume(saved)["step"] == 3
    run(second, range(3, 6))
    for name, weight in second.full_weights().items():
        torch.testing.assert_close(weight, first.full_weights()[name], rtol=1e-5, atol=1e-6)


def test_offloading_changes_nothing() -> None:
    engines = [Engine(module(), OptimiserSettings("float32", 2, 0.1, 1.0, offload)) for offload in (False, True)]
    norms = [run(engine, range(4)) for engine in engines]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    weights = [engine.full_weights() for engine in engines]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-6, atol=1e-7)


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    rates = [learning_rate_at(step, 20, 1.0, 0.2) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0 and all(later < earlier for earlier, later in itertools.pairwise(rates[4:]))
    assert rates[12] == pytest.approx(0.5) and rates[-1] < 0.01


@pytest.mark.parametrize("units", [1, 2, 7, 60, 1000])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 1.0])
def test_learning_rates_are_to_the_bit_those_of_the_formula(units: int, share: float) -> None:
    """The one that runs counted in steps have always had; no rate is 0, the first one's neither."""
    warmup = max(1, round(units * share))
    rising = [3e-4 * (step + 1) / warmup for step in range(warmup)]
    falling = [
        3e-4 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (units - warmup))) for step in range(warmup, units)
    ]
    rates = [learning_rate_at(step, units, 3e-4, share) for step in range(units)]
    assert rates == rising + falling and min(rates) > 0 and max(rates) == 3e-4


def test_deepspeed_compiles_nothing() -> None:
    """Its operation for CPUs serves inference; killed while compiling, it leaves a lock file that others wait for."""
    import deepspeed.comm.comm

    Engine(module(), OptimiserSettings("float32", 1, weight_decay=0.0, gradient_clipping=1.0))
    assert deepspeed.comm.comm.cdb.shm_comm_op is None
