"""The resumable loop: steps of an engine in a stage's folder, from wherever an earlier attempt got to.

Covers when training ends, resuming, metrics.jsonl, the progress bar, checkpoints, and stopping on a signal. What a
step does comes in as a function: training an encoder (train/) and healing a language model (prune/) are loops alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from statistics import mean
from time import monotonic
from typing import Any, Protocol

from drama_dist.distributed import ranks
from drama_dist.distributed.checkpoints import Checkpoints
from drama_dist.distributed.engine import Engine, learning_rate_at
from drama_dist.run import interrupts
from drama_dist.run.artefact import CHECKPOINTS
from drama_dist.run.folder import StageFolder
from drama_dist.run.progress import progress_bar


@dataclass(frozen=True)
class Schedule:
    """When training ends, its learning rates (see `learning_rate_at`), and after how many steps a checkpoint is saved.

    steps, minutes: one of the two is None. Minutes end with the step in which they are over.
    keep_checkpoints: how many of the newest stay; keep_best: beside them the one with the least loss.
    """

    steps: int | None
    minutes: float | None
    learning_rate: float
    warmup_share: float
    checkpoint_every: int
    keep_checkpoints: int
    keep_best: bool

    @property
    def units(self) -> int:
        """Steps, or seconds: what the schedule is counted in."""
        if self.minutes is not None:
            return math.ceil(60 * self.minutes)
        assert self.steps is not None
        return self.steps


@dataclass(frozen=True)
class StepReport:
    """figures: a line of metrics.jsonl, with "loss" among them. progress: what the bar shows."""

    figures: dict[str, Any]
    progress: str


class Stateful(Protocol):
    """What changes from step to step beside the engine, the same on all ranks."""

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""


class ResumableLoop:
    """The steps of one engine that are still to do; all ranks make every call. first_step: counted from 0.

    beside: its state is saved in every checkpoint with the engine's, and resumed.
    """

    def __init__(self, folder: StageFolder, engine: Engine, schedule: Schedule, beside: Stateful | None = None):
        self._folder, self._engine, self._schedule, self._beside = folder, engine, schedule, beside
        self._checkpoints = Checkpoints(folder.folder / CHECKPOINTS, schedule.keep_checkpoints)
        state = engine.resume(self._checkpoints)
        self.first_step = int(state["step"])
        self._seconds_before = float(state.get("seconds", 0))
        if beside and "beside" in state:
            beside.load_state_dict(state["beside"])
        folder.forget_metrics_after(self.first_step)

    def run(self, label: str, do_step: Callable[[int, float], StepReport]) -> dict[str, Any]:
        """Call do_step(step, learning rate) for every step, which updates the weights.

        Returns what provenance.json says of it: all steps, and the minutes they took. The clock starts here, at what it
        showed when the checkpoint was saved.

        Called inside `interrupts.deferred`, which lasts until the stage has saved its result: raises Stopped after the
        step in which a signal asked for it, with a checkpoint saved. After the last step no checkpoint is saved, and a
        signal is left to the end of `deferred`.
        """
        schedule, step = self._schedule, self.first_step
        losses: list[float] = []  # since the last checkpoint
        began = monotonic() - self._seconds_before
        done = self._done(step, began)
        with closing(progress_bar(schedule.steps, label, "steps", done=step)) as bar:
            while done < schedule.units:
                rate = learning_rate_at(done, schedule.units, schedule.learning_rate, schedule.warmup_share)
                report = do_step(step, rate)
                step += 1
                done = self._done(step, began)
                self._folder.log(step=step, fraction=done / schedule.units, **report.figures)
                bar.total = round(step * schedule.units / done) if done else None  # with minutes as many as will fit
                bar.set_postfix_str(report.progress, refresh=False)
                bar.update(1)
                losses.append(report.figures["loss"])
                if done == schedule.units:
                    break
                stopping = interrupts.wanted()
                if stopping or step % schedule.checkpoint_every == 0:
                    facts: dict[str, Any] = {"beside": self._beside.state_dict()} if self._beside else {}
                    if schedule.keep_best:
                        facts["loss"] = mean(losses)
                    self._engine.save(self._checkpoints, step, seconds=monotonic() - began, **facts)
                    losses = []
                if stopping:
                    self._checkpoints.wait()
                    raise interrupts.Stopped(f"{label}: saved after step {step}")
        self._checkpoints.wait()
        return {"steps": step, "minutes": round((monotonic() - began) / 60, 3)}

    def _done(self, step: int, began: float) -> int:
        """Units of the schedule that are over after so many steps; seconds are whole, and those of rank 0's clock."""
        if self._schedule.minutes is None:
            return step
        return min(self._schedule.units, ranks.on_every_rank(int(monotonic() - began))[0])
