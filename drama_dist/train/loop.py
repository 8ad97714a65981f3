"""The training stage: one run of contrastive training over any number of ranks, resumable.

Covers the stage's folder, the order of batches, what metrics.jsonl says of a step, and saving the encoder, whose
weights may be averaged with those that training began from (WiSE-FT, Wortsman et al. 2022, arXiv 2109.01903, eq. 1).
What a step does is in step.py, what it costs in telemetry.py, resuming and checkpoints in distributed/loop.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from typing import Any

import torch

from drama_dist.corpus.collection import PassageTable
from drama_dist.distributed import ranks
from drama_dist.distributed.engine import Engine
from drama_dist.distributed.loop import ResumableLoop, Schedule, StepReport
from drama_dist.encoder.backbone import Encoder
from drama_dist.encoder.cut_texts import CutTexts
from drama_dist.records import Example, read_json_lines
from drama_dist.run.files import write_text
from drama_dist.run.folder import StageFolder
from drama_dist.settings import Settings, TrainSettings
from drama_dist.train.batches import Mix, batches, check_batches, texts_of, with_share_of_passages
from drama_dist.train.step import TrainingStep
from drama_dist.train.target_vectors import VectorTargets
from drama_dist.train.targets import Targets
from drama_dist.train.telemetry import Telemetry
from drama_dist.train.term import joined
from drama_dist.train.token_lengths import token_lengths


def train_encoder(
    settings: Settings,
    folder: StageFolder,
    start: Encoder,
    examples: Sequence[Example],
    table: PassageTable,
    scores: Targets | None = None,
    vectors: VectorTargets | None = None,
    begin: Callable[[str], Encoder] | None = None,
) -> dict[str, Any]:
    """Train `start` in place and save it in the open folder; returns what provenance.json says of it.

    scores, vectors: the teacher's, where the settings ask for them. begin: makes again what `start` was, on
    the device named, for train.start_share; None: what is saved is what training came to.

    Called inside `interrupts.deferred`, which should last until the folder is finished: see ResumableLoop.run for what
    a signal does. Raises ValueError where there are too few examples for a batch, or a batch too small for the ranks.
    """
    train = settings.train
    check_batches(examples, train.batch_size, ranks.world_size(), _mix(train))
    step = TrainingStep(start, train, scores, vectors)
    if ranks.rank() == 0:
        write_text(folder.folder / "token_lengths.json", json.dumps(token_lengths(start, table, examples)) + "\n")
    done = _run_steps(settings, folder, step, examples, table)
    _save_encoder(folder, start, step.engine, begin, train.start_share)
    return {"examples": len(examples), **done, "dtype": step.dtype, "cut": _texts_cut(folder)}


def _run_steps(
    settings: Settings,
    folder: StageFolder,
    training_step: TrainingStep,
    examples: Sequence[Example],
    table: PassageTable,
) -> dict[str, Any]:
    train = settings.train
    schedule = Schedule(
        train.steps,
        train.minutes,
        train.learning_rate,
        train.warmup_share,
        train.checkpoint_every,
        train.keep_checkpoints,
        keep_best=True,
    )
    loop = ResumableLoop(folder, training_step.engine, schedule)
    drawn = train.batch_size, train.hard_negatives, settings.seed, loop.first_step, _mix(train)
    order = batches(examples, *drawn)
    events = folder.folder / "tensorboard" if train.tensorboard else None
    telemetry = Telemetry(training_step.encoder, events, loop.first_step)

    def do_step(step: int, learning_rate: float) -> StepReport:
        began = time.monotonic()
        batch = with_share_of_passages(texts_of(next(order), table), train.passage_share)
        result = training_step(batch, learning_rate)
        objective, cost = result.objective, telemetry.figures(result, time.monotonic() - began)
        of_optimiser = {"learning_rate": learning_rate, "gradient_norm": result.gradient_norm}
        figures = joined({"loss": objective.loss}, objective.figures, of_optimiser, cost)
        telemetry.write(step + 1, figures, objective)
        return StepReport(figures, _progress(figures))

    with closing(telemetry):
        return loop.run(folder.name, do_step)


def _mix(train: TrainSettings) -> Mix:
    return Mix(train.source_weights, train.same_in_batch)


def _texts_cut(folder: StageFolder) -> dict[str, dict[str, int]]:
    """What was cut of the texts of all steps on all ranks; a text counts in every step that has it."""
    steps = [line for _, line in read_json_lines(folder.folder / "metrics.jsonl")] if ranks.rank() == 0 else []
    totals = {"queries": CutTexts(), "passages": CutTexts()}
    for line in steps:
        for what in totals:
            totals[what] += CutTexts(**line.get(f"{what}_cut", {}))
    return {what: asdict(total) for what, total in totals.items()}


def _progress(figures: dict[str, Any]) -> str:
    twice = f", {figures['recomputed_share']:.0%} twice" if figures["recomputed_share"] else ""
    return (
        f"loss {figures['loss']:.3f}, {figures['tokens_per_second']:,.0f} tokens/s, "
        f"{figures['peak_share']:.0%} of peak, {figures['peak_memory_gib']:.1f} GiB{twice}"
    )


def _save_encoder(
    folder: StageFolder, encoder: Encoder, engine: Engine, begin: Callable[[str], Encoder] | None, start_share: float
) -> None:
    weights = engine.full_weights()

    def save() -> None:
        for name, weight in begin("cpu").named_parameters() if begin and start_share else ():
            weights[name] = torch.lerp(weights[name], weight.detach().float(), start_share)
        encoder.save(folder.folder, weights)

    ranks.by_rank_0(save)
