"""The training stage: one run of contrastive training over any number of ranks, resumable.

Covers the order of a step, metrics and checkpoints. The loss is in objective.py, memory in
grad_cache.py, cost in telemetry.py, the optimiser in engine.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing
from statistics import mean
from typing import Any

import torch

from drama_dist.corpus.collection import PassageTable
from drama_dist.distributed import ranks
from drama_dist.distributed.checkpoints import Checkpoints
from drama_dist.distributed.engine import Engine, OptimiserSettings, learning_rate_at
from drama_dist.distributed.precision import agreed_dtype_name
from drama_dist.encoder.backbone import Encoder
from drama_dist.records import Example
from drama_dist.run import interrupts
from drama_dist.run.folder import CHECKPOINTS, StageFolder, write_text
from drama_dist.run.progress import progress_bar
from drama_dist.settings import Settings, TrainSettings
from drama_dist.train.batches import Batch, batches
from drama_dist.train.grad_cache import Encoded, GradCache
from drama_dist.train.objective import Objective, contrastive_objective
from drama_dist.train.telemetry import Telemetry
from drama_dist.train.token_lengths import token_lengths


def train_encoder(
    settings: Settings, stage: StageFolder, start: Encoder, examples: list[Example], table: PassageTable
) -> dict[str, Any]:
    """Train `start` and save it in the stage's folder; returns facts for its provenance."""
    choice = settings.train
    if choice.batch_size < ranks.world_size():
        raise ValueError(f"train.batch_size={choice.batch_size} for {ranks.world_size()} ranks: each needs a query")
    dtype = agreed_dtype_name(choice.dtype)
    engine = Engine(
        start,
        OptimiserSettings(
            dtype, choice.zero_stage, choice.weight_decay, choice.gradient_clipping, choice.offload_optimizer
        ),
    )
    if ranks.rank() == 0:
        lengths = token_lengths(start, table, examples)
        write_text(stage.folder / "token_lengths.json", json.dumps(lengths) + "\n")
    _steps(settings, stage, start, engine, examples, table)
    _save_encoder(stage, start, engine)
    return {"examples": len(examples), "steps": choice.steps, "dtype": dtype}


def _steps(
    settings: Settings,
    stage: StageFolder,
    encoder: Encoder,
    engine: Engine,
    examples: list[Example],
    table: PassageTable,
) -> None:
    choice = settings.train
    saved = Checkpoints(stage.folder / CHECKPOINTS, choice.keep_checkpoints)
    first = engine.resume(saved)
    stage.forget_metrics_after(first)
    cache = _grad_cache(choice, encoder, engine)
    telemetry = Telemetry(encoder, stage.folder / "tensorboard" if choice.tensorboard else None, first)
    order: Iterator[Batch] = batches(examples, choice.batch_size, choice.hard_negatives, settings.seed, first)
    bar = progress_bar(choice.steps, stage.name, "steps", done=first)
    losses: list[float] = []  # since the last checkpoint
    stopping = False
    with closing(telemetry):
        for step in range(first, choice.steps):
            began = time.monotonic()
            objective, encoded = _batch_step(settings, next(order), encoder, cache, table)
            rate = learning_rate_at(step, choice.steps, choice.learning_rate, choice.warmup_share)
            norm = engine.step(rate)
            cost = telemetry.figures(encoded.lengths, objective, time.monotonic() - began, encoded.recomputed)
            _report_step(stage, telemetry, step + 1, objective, {"learning_rate": rate, "gradient_norm": norm, **cost})
            bar.set_postfix_str(_postfix(objective, cost), refresh=False)
            bar.update(1)
            losses.append(objective.loss)
            stopping = interrupts.wanted() and step + 1 < choice.steps
            if stopping or ((step + 1) % choice.checkpoint_every == 0 and step + 1 < choice.steps):
                engine.save(saved, step + 1, loss=mean(losses), activation_budget=cache.activation_budget)
                losses = []
            if stopping:
                break
    bar.close()
    saved.wait()
    if stopping:
        raise interrupts.Stopped(f"{stage.name}: saved after step {step + 1}")


def _grad_cache(choice: TrainSettings, encoder: Encoder, engine: Engine) -> GradCache:
    encoder.train()
    if choice.checkpoint_layers:
        encoder.checkpoint_layers()
    budget = None if choice.activation_budget == "auto" else float(choice.activation_budget) * 2**30
    return GradCache(encoder, engine, choice.chunk_tokens, budget)


def _report_step(
    stage: StageFolder, telemetry: Telemetry, step: int, objective: Objective, figures: dict[str, Any]
) -> None:
    named = {name: getattr(objective, name) for name in ("loss", "per_dim", "accuracy", "margin", "masked")}
    stage.log(step=step, **named, **figures)
    telemetry.write(step, named | figures, objective)


def _postfix(objective: Objective, cost: dict[str, Any]) -> str:
    again = f", {cost['recomputed_share']:.0%} twice" if cost["recomputed_share"] else ""
    return (
        f"loss {objective.loss:.3f}, {cost['tokens_per_second']:,.0f} tokens/s, "
        f"{cost['peak_share']:.0%} of peak, {cost['peak_memory_gib']:.1f} GiB{again}"
    )


def _batch_step(
    settings: Settings, batch: Batch, encoder: Encoder, cache: GradCache, table: PassageTable
) -> tuple[Objective, Encoded]:
    """Forward and backward of one global batch."""
    queries, passages = ranks.rank_slice(len(batch.queries)), ranks.rank_slice(len(batch.passages))
    contents = table.contents([table.position(passage) for passage in batch.passages])
    sequences = encoder.tokenize_queries([batch.queries[i] for i in queries])
    sequences += encoder.tokenize_passages([contents[i] for i in passages])
    first_place: dict[str, int] = {}
    same_text = [first_place.setdefault(text, place) for place, text in enumerate(contents)]
    encoded = cache.encode(sequences)
    objective = contrastive_objective(
        encoded.embeddings_NK[: len(queries)],
        encoded.embeddings_NK[len(queries) :],
        torch.tensor(batch.positives, device=encoder.device),
        torch.tensor(same_text, device=encoder.device),
        settings.encoder,
        settings.train,
    )
    cache.backward(torch.cat([objective.query_gradient_BK, objective.passage_gradient_NK]))
    return objective, encoded


def _save_encoder(stage: StageFolder, encoder: Encoder, engine: Engine) -> None:
    weights = engine.full_weights()
    if ranks.rank() == 0:
        encoder.save(stage.folder, weights)
    ranks.barrier()
