"""The optimiser step: against AdamW written out, and exact resumption."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from drama_dist.engine import Engine, OptimiserSettings, checkpoints, learning_rate_at


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 1))


def piece(model: nn.Module, step: int, part: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * step + part)
    rows = torch.randn(4, 5, generator=generator).to(next(model.parameters()).dtype)
    return 10 * model(rows).float().square().mean()


def run(engine: Engine, steps: range, save_at: int | None = None, folder: Path | None = None) -> list[float]:
    norms = []
    for step in steps:
        for part in range(3):
            engine.backward(piece(engine.module, step, part), last=part == 2)
        norms.append(engine.step(0.01))
        if step + 1 == save_at and folder is not None:
            engine.save(folder, save_at, keep=2)
    return norms


@pytest.mark.parametrize("stage", [1, 2])
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("stages", [(1, 1), (2, 2), (1, 2)], ids=str)
def test_resuming_gives_the_same_weights_to_the_bit(tmp_path: Path, stages: tuple[int, int], dtype: str) -> None:
    first = Engine(module(), OptimiserSettings(dtype, stages[0], 0.1, 1.0))
    run(first, range(6), save_at=3, folder=tmp_path)
    second = Engine(module(), OptimiserSettings(dtype, stages[1], 0.1, 1.0))
    assert second.resume(tmp_path) == 3
    run(second, range(3, 6))
    expected = first.full_weights()
    assert all(torch.equal(weight, expected[name]) for name, weight in second.full_weights().items())


def test_only_the_last_checkpoints_stay_and_half_written_ones_are_ignored(tmp_path: Path) -> None:
    engine = Engine(module(), OptimiserSettings("float32", 1, 0.0, 1.0))
    assert engine.resume(tmp_path) == 0
    for step in (1, 2, 3):
        run(engine, range(step, step + 1))
        engine.save(tmp_path, step, keep=2)
    (tmp_path / "step-0000009.tmp").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-0000002", "step-0000003"]
    assert sorted(path.suffix for path in checkpoints(tmp_path)[-1].iterdir()) == [".json", *[".safetensors"] * 3]


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    rates = [learning_rate_at(step, 20, 1.0, 0.2) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0 and all(later < earlier for earlier, later in itertools.pairwise(rates[4:]))
    assert rates[12] == pytest.approx(0.5) and rates[-1] < 0.01
