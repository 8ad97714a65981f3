"""The resumable loop: steps of an engine in a stage's folder, from wherever an earlier attempt got to.

Covers resuming, metrics.jsonl, the progress bar, checkpoints, and stopping on a signal. What a step does comes in as a
function: training an encoder (train/) and healing a language model (prune/) are loops alike.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from statistics import mean
from typing import Any

from drama_dist.distributed.checkpoints import Checkpoints
from drama_dist.distributed.engine import Engine, learning_rate_at
from drama_dist.run import interrupts
from drama_dist.run.folder import CHECKPOINTS, StageFolder
from drama_dist.run.progress import progress_bar


@dataclass(frozen=True)
class Schedule:
    """How many steps, their learning rates (see `learning_rate_at`), and after how many a checkpoint is saved.

    keep_checkpoints: how many of the newest stay; keep_best: beside them the one with the least loss.
    """

    steps: int
    learning_rate: float
    warmup_share: float
    checkpoint_every: int
    keep_checkpoints: int
    keep_best: bool


@dataclass(frozen=True)
class StepReport:
    """figures: a line of metrics.jsonl, with "loss" among them. progress: what the bar shows."""

    figures: dict[str, Any]
    progress: str


class ResumableLoop:
    """The steps of one engine that are still to do; all ranks make every call. first_step: counted from 0."""

    def __init__(self, folder: StageFolder, engine: Engine, schedule: Schedule):
        self._folder, self._engine, self._schedule = folder, engine, schedule
        self._checkpoints = Checkpoints(folder.folder / CHECKPOINTS, schedule.keep_checkpoints)
        self.first_step = engine.resume(self._checkpoints)
        folder.forget_metrics_after(self.first_step)

    def run(self, label: str, do_step: Callable[[int, float], StepReport]) -> None:
        """Call do_step(step, learning rate) for every step, which updates the weights.

        Called inside `interrupts.deferred`, which lasts until the stage has saved its result: raises Stopped after the
        step in which a signal asked for it, with a checkpoint saved. After the last step no checkpoint is saved, and a
        signal is left to the end of `deferred`.
        """
        schedule = self._schedule
        losses: list[float] = []  # since the last checkpoint
        with closing(progress_bar(schedule.steps, label, "steps", done=self.first_step)) as bar:
            for step in range(self.first_step, schedule.steps):
                rate = learning_rate_at(step, schedule.steps, schedule.learning_rate, schedule.warmup_share)
                report = do_step(step, rate)
                done = step + 1
                self._folder.log(step=done, **report.figures)
                bar.set_postfix_str(report.progress, refresh=False)
                bar.update(1)
                losses.append(report.figures["loss"])
                if done == schedule.steps:
                    break
                stopping = interrupts.wanted()
                if stopping or done % schedule.checkpoint_every == 0:
                    facts = {"loss": mean(losses)} if schedule.keep_best else {}
                    self._engine.save(self._checkpoints, done, **facts)
                    losses = []
                if stopping:
                    self._checkpoints.wait()
                    raise interrupts.Stopped(f"{label}: saved after step {done}")
        self._checkpoints.wait()
