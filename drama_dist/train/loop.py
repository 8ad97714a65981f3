"""The training stage: one run of contrastive training over any number of ranks, resumable.

Covers the order of a step, metrics and checkpoints. The loss is in objective.py, memory in
grad_cache.py, the optimiser in engine.py.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from drama_dist import ranks
from drama_dist.corpus.table import PassageTable
from drama_dist.encoder.backbone import Encoder
from drama_dist.engine import Engine, OptimiserSettings, learning_rate_at
from drama_dist.progress import progress_bar
from drama_dist.records import Example, read_records
from drama_dist.settings import Settings, as_dict
from drama_dist.stages import Stage, open_stage, write_text
from drama_dist.train.batches import Batch, batches
from drama_dist.train.grad_cache import GradCache
from drama_dist.train.objective import Objective, contrastive_objective
from drama_dist.train.token_lengths import token_lengths


def train(
    settings: Settings, name: str, start: Encoder, augment: Path, table: PassageTable, inputs: dict[str, str]
) -> Path:
    """Train `start` on the examples of the augment stage; the artefact is RUN/NAME with the encoder in it.

    Raises ValueError where there are too few examples for a batch.
    """
    sections = {"seed": settings.seed, "encoder": as_dict(settings.encoder), "train": as_dict(settings.train)}
    stage = open_stage(settings.run, name, sections, inputs)
    if stage.done:
        return stage.final
    examples = read_records(augment / "examples.jsonl", Example.from_json)
    choice = settings.train
    engine = Engine(
        start, OptimiserSettings(choice.dtype, choice.zero_stage, choice.weight_decay, choice.gradient_clipping)
    )
    if ranks.rank() == 0:
        lengths = token_lengths(start, table, examples)
        write_text(stage.folder / "token_lengths.json", json.dumps(lengths) + "\n")
    _steps(settings, stage, start, engine, examples, table)
    _save_encoder(stage, start, engine)
    return stage.finish(examples=len(examples), steps=choice.steps)


def _steps(
    settings: Settings, stage: Stage, encoder: Encoder, engine: Engine, examples: list[Example], table: PassageTable
) -> None:
    choice = settings.train
    saved = stage.folder / "checkpoints"
    first = engine.resume(saved)
    stage.forget_metrics_after(first)
    cache = GradCache(encoder, engine, choice.chunk_tokens, choice.kept_tokens)
    order: Iterator[Batch] = batches(examples, choice.batch_size, choice.hard_negatives, settings.seed, first)
    bar = progress_bar(choice.steps, stage.name, "steps", done=first)
    for step in range(first, choice.steps):
        began = time.monotonic()
        objective, tokens, repeated = _batch_step(settings, next(order), encoder, cache, table)
        rate = learning_rate_at(step, choice.steps, choice.learning_rate, choice.warmup_share)
        norm = engine.step(rate)
        seconds = time.monotonic() - began
        stage.log(
            step=step + 1,
            loss=objective.loss,
            per_dim=objective.per_dim,
            accuracy=objective.accuracy,
            margin=objective.margin,
            learning_rate=rate,
            gradient_norm=norm,
            tokens=tokens,
            tokens_per_second=round(tokens / seconds, 1),
            recomputed_share=round(repeated, 4),
        )
        bar.set_postfix_str(f"loss {objective.loss:.3f}, {tokens / seconds:,.0f} tokens/s", refresh=False)
        bar.update(1)
        if (step + 1) % choice.checkpoint_every == 0 and step + 1 < choice.steps:
            engine.save(saved, step + 1, choice.keep_checkpoints)
    bar.close()


def _batch_step(
    settings: Settings, batch: Batch, encoder: Encoder, cache: GradCache, table: PassageTable
) -> tuple[Objective, int, float]:
    """Forward and backward of one global batch; returns the figures, the global tokens, the share recomputed."""
    queries, passages = ranks.own_share(len(batch.queries)), ranks.own_share(len(batch.passages))
    contents = table.contents([table.position(passage) for passage in batch.passages])
    sequences = encoder.tokenize_queries([batch.queries[i] for i in queries])
    sequences += encoder.tokenize_passages([contents[i] for i in passages])
    first_place: dict[str, int] = {}
    same_text = [first_place.setdefault(text, place) for place, text in enumerate(contents)]
    embeddings = cache.encode(sequences)
    objective = contrastive_objective(
        embeddings[: len(queries)],
        embeddings[len(queries) :],
        torch.tensor([batch.positives[i] for i in queries], device=encoder.device),
        torch.tensor(same_text, device=encoder.device),
        settings.encoder,
        settings.train,
    )
    repeated = cache.backward(torch.cat([objective.query_gradient_BK, objective.passage_gradient_NK]))
    tokens = sum(ranks.on_every_rank(sum(len(sequence) for sequence in sequences)))
    return objective, tokens, repeated


def _save_encoder(stage: Stage, encoder: Encoder, engine: Engine) -> None:
    weights = engine.full_weights()
    if ranks.rank() == 0:
        encoder.float().load_state_dict(weights)
        encoder.save(stage.folder)
        shutil.rmtree(stage.folder / "checkpoints", ignore_errors=True)
    ranks.barrier()
