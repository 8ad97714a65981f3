"""The resumable loop: what it leaves behind, and that a stop and a new start change nothing."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from drama_dist.distributed.engine import Engine, OptimiserSettings, learning_rate_at
from drama_dist.distributed.loop import ResumableLoop, Schedule, StepReport
from drama_dist.run import interrupts
from drama_dist.run.folder import StageFolder, open_stage

SCHEDULE = Schedule(
    steps=7, learning_rate=0.01, warmup_share=0.3, checkpoint_every=3, keep_checkpoints=1, keep_best=True
)


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    before = signal.getsignal(signal.SIGUSR1)
    interrupts.listen()
    yield
    signal.signal(signal.SIGUSR1, before)


def run(
    folder: StageFolder, after: Callable[[int], object] = lambda step: None, schedule: Schedule = SCHEDULE
) -> dict[str, torch.Tensor]:
    """Train a tiny module on random rows; `after` is told each step that is done, counted from 1."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
    engine = Engine(module, OptimiserSettings("float32", 1, weight_decay=0.1, gradient_clipping=1.0))

    def do_step(step: int, learning_rate: float) -> StepReport:
        rows = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
        loss = module(rows).square().mean()
        engine.backward(loss, last=True)
        engine.step(learning_rate)
        after(step + 1)
        return StepReport({"loss": float(loss.detach()), "learning_rate": learning_rate}, "")

    with interrupts.deferred():
        ResumableLoop(folder, engine, schedule).run("tiny", do_step)
    return engine.full_weights()


def lines(folder: StageFolder) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder.folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def checkpoints(folder: StageFolder) -> list[str]:
    return sorted(path.name for path in (folder.folder / "checkpoints").iterdir())


def open_folder(path: Path) -> StageFolder:
    return open_stage(path, "tiny", {}, {})


@pytest.fixture
def whole(tmp_path: Path) -> tuple[StageFolder, dict[str, torch.Tensor]]:
    folder = open_folder(tmp_path / "whole")
    return folder, run(folder)


def test_steps_are_logged_at_their_rates_and_saved(whole: tuple[StageFolder, dict[str, torch.Tensor]]) -> None:
    folder, _ = whole
    assert [line["step"] for line in lines(folder)] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["learning_rate"] for line in lines(folder)] == [learning_rate_at(n, 7, 0.01, 0.3) for n in range(7)]
    losses = [line["loss"] for line in lines(folder)]
    best = 6 if sum(losses[3:6]) < sum(losses[:3]) else 3
    assert checkpoints(folder) == sorted({f"step-{best:07d}", "step-0000006"})


def test_only_the_newest_checkpoint_stays_where_the_best_is_not_asked_for(tmp_path: Path) -> None:
    folder = open_folder(tmp_path / "newest")
    run(folder, schedule=replace(SCHEDULE, checkpoint_every=1, keep_best=False))
    assert checkpoints(folder) == ["step-0000006"]


def test_a_failure_between_checkpoints_costs_their_steps_and_changes_nothing(
    whole: tuple[StageFolder, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder = open_folder(tmp_path / "failed")

    def fail(step: int) -> None:
        if step == 5:
            while checkpoints(folder) != ["step-0000003"]:  # written by a thread, which an end of the process would end
                time.sleep(0.01)
            raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        run(folder, fail)
    assert [line["step"] for line in lines(folder)] == [1, 2, 3, 4]
    steps: list[int] = []
    weights = run(folder, steps.append)
    assert steps == [4, 5, 6, 7] and lines(folder) == lines(whole[0])
    assert all(torch.equal(weights[name], weight) for name, weight in whole[1].items())


@pytest.mark.parametrize("moment", [2, 7])
def test_a_signal_saves_the_step_that_it_came_in(
    moment: int, whole: tuple[StageFolder, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """In the last step the loop ends, and the stage saves its result: there is no checkpoint of that step."""
    folder, steps = open_folder(tmp_path / "stopped"), []

    def stop(step: int) -> None:
        steps.append(step)
        if step == moment:
            signal.raise_signal(signal.SIGUSR1)

    message = "at the end of a stage" if moment == 7 else "tiny: saved after step 2"
    with pytest.raises(interrupts.Stopped, match=message):
        run(folder, stop)
    assert steps == list(range(1, moment + 1))
    assert (f"step-{moment:07d}" in checkpoints(folder)) == (moment == 2)
    weights = run(folder, steps.append)
    assert steps == [*range(1, moment + 1), *range(3 if moment == 2 else 7, 8)] and lines(folder) == lines(whole[0])
    assert all(torch.equal(weights[name], weight) for name, weight in whole[1].items())
