"""The resumable loop: what it leaves behind, and that a stop and a new start change nothing."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from drama_dist.distributed import loop, ranks
from drama_dist.distributed.engine import Engine, OptimiserSettings, learning_rate_at
from drama_dist.distributed.loop import ResumableLoop, Schedule, StepReport
from drama_dist.run import interrupts
from drama_dist.run.folder import StageFolder, open_stage

SCHEDULE = Schedule(
    steps=7, minutes=None, learning_rate=0.01, warmup_share=0.3, checkpoint_every=3, keep_checkpoints=1, keep_best=True
)
TIMED = replace(SCHEDULE, steps=None, minutes=1)
# What steps take: the ninth goes from 56.75 to 66.25
SECONDS = [0.75, 7.5, 6.25, 10, 3, 12.25, 9, 8, 9.5, 11]


class Clock:
    """Time passes when a test says so; a training may begin at any."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, now: float = 1e6):
        self.now = now
        monkeypatch.setattr(loop, "monotonic", lambda: self.now)

    def tick(self, step: int) -> None:
        """Let a step take its time."""
        self.now += SECONDS[step - 1]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


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


def test_minutes_end_with_the_step_in_which_they_are_over(tmp_path: Path, clock: Clock) -> None:
    folder = open_folder(tmp_path / "timed")
    run(folder, clock.tick, TIMED)
    over = [0, 0, 8, 14, 24, 27, 39, 48, 56]  # whole seconds when each step begins
    rates = [0.01 * (second + 1) / 18 if second < 18 else _cosine((second - 18) / 42) for second in over]
    assert [line["learning_rate"] for line in lines(folder)] == pytest.approx(rates, rel=1e-12)
    assert [line["fraction"] for line in lines(folder)] == [*(second / 60 for second in over[1:]), 1]


def _cosine(fraction: float) -> float:
    return 0.01 * (1 + math.cos(math.pi * fraction)) / 2


def test_nothing_before_the_first_step_counts_but_checkpoints_do(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, saved = ResumableLoop.__init__, Engine.save

    def load_for_an_hour(self: ResumableLoop, *arguments: Any) -> None:
        made(self, *arguments)
        clock.now += 3600

    def save_for_ten_seconds(self: Engine, *arguments: Any, **facts: Any) -> None:
        saved(self, *arguments, **facts)
        clock.now += 10

    monkeypatch.setattr(ResumableLoop, "__init__", load_for_an_hour)
    monkeypatch.setattr(Engine, "save", save_for_ten_seconds)
    folder = open_folder(tmp_path / "slow")
    run(folder, clock.tick, TIMED)
    over = [0, 8, 14, 34, 37, 49, 60]  # after the third step and after the sixth a checkpoint is saved
    assert [line["fraction"] for line in lines(folder)] == [second / 60 for second in over]


@pytest.mark.parametrize("how", ["killed", "stopped", "killed, seconds lost"])
def test_a_resumed_run_has_the_minutes_that_its_checkpoint_left(
    how: str, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As without the interruption, to the last weight; in the last case, a control, the clock starts anew."""
    whole, folder = open_folder(tmp_path / "whole"), open_folder(tmp_path / "resumed")
    expected = run(whole, clock.tick, TIMED)

    def end(step: int) -> None:
        clock.tick(step)
        if step == 5:
            if how == "stopped":
                return signal.raise_signal(signal.SIGUSR1)
            while checkpoints(folder) != ["step-0000003"]:
                time.sleep(0.01)
            raise RuntimeError("killed")

    with pytest.raises((RuntimeError, interrupts.Stopped)):
        run(folder, end, TIMED)
    clock.now -= 5e5  # another machine's clock
    if how == "killed, seconds lost":
        resume = Engine.resume
        monkeypatch.setattr(Engine, "resume", lambda *both: {"step": resume(*both)["step"]})
    weights = run(folder, clock.tick, TIMED)
    if how == "killed, seconds lost":
        assert len(lines(folder)) == len(lines(whole)) + 1
    else:
        assert lines(folder) == lines(whole)
        assert all(torch.equal(weights[name], weight) for name, weight in expected.items())


def test_the_bar_expects_the_steps_that_will_fit(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    totals: list[int | None] = []

    class Bar(SimpleNamespace):
        def update(self, steps: int) -> None:
            totals.append(self.total)

    bar = Bar(total=None, set_postfix_str=lambda *_, **__: None, close=lambda: None)
    monkeypatch.setattr(loop, "progress_bar", lambda *_, **__: bar)
    run(open_folder(tmp_path / "timed"), clock.tick, TIMED)
    assert totals == [None, 15, 13, 10, 11, 9, 9, 9, 9]
    totals.clear()
    run(open_folder(tmp_path / "steps"))
    assert totals == [7] * 7


@pytest.mark.parametrize("agree", [True, False])
def test_ranks_follow_the_clock_of_rank_0(agree: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1's clock is four times as fast; the second case is a control: by its own it would end early."""
    told: list[int] = []
    clock = Clock(monkeypatch)
    monkeypatch.setattr(loop, "ranks", SimpleNamespace(on_every_rank=lambda value: [told.append(value) or value, 99]))
    first = open_folder(tmp_path / "rank-0")
    run(first, clock.tick, TIMED)
    by_rank_0 = iter(told)
    if agree:
        monkeypatch.setattr(loop, "ranks", SimpleNamespace(on_every_rank=lambda value: [next(by_rank_0), value]))
    clock, second = Clock(monkeypatch, now=7), open_folder(tmp_path / "rank-1")
    run(second, lambda step: [clock.tick(step) for _ in range(4)], TIMED)
    assert (lines(first) == lines(second)) == agree and (len(lines(second)) == 9) == agree


@pytest.mark.slow
def test_two_ranks_have_the_same_rates_and_end_together(tmp_path: Path) -> None:
    """Of real clocks, the second one twice as fast."""
    program = f"""
import sys, time
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_loop import *
interrupts.listen()
ranks.start()
loop.monotonic = lambda: time.monotonic() * (1 + ranks.rank())
rates = []
at = loop.learning_rate_at
loop.learning_rate_at = lambda *all: rates.append(at(*all)) or rates[-1]
run(open_folder(Path({str(tmp_path)!r})), lambda step: time.sleep(0.3), replace(TIMED, minutes=0.1))
Path({str(tmp_path)!r}, f"rates-{{ranks.rank()}}").write_text(json.dumps(rates))
ranks.stop()
ranks.end(0)
"""
    meet = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(ranks._free_port()),
    }
    started = [
        subprocess.Popen([sys.executable, "-c", program], env=os.environ | meet | {"RANK": rank, "LOCAL_RANK": rank})
        for rank in "01"
    ]
    try:
        assert [rank.wait(timeout=120) for rank in started] == [0, 0]
    finally:
        for rank in started:
            rank.kill()
            rank.wait()
    rates = [json.loads((tmp_path / f"rates-{rank}").read_text()) for rank in "01"]
    assert rates[0] == rates[1] and len(rates[0]) > 3 and len(set(rates[0])) > 2
