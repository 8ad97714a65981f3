"""Saving a checkpoint: how long training waits, against a save that blocks until all is on disk.

python benchmarks/checkpoint.py [--model runs/quickstart/export] [--rounds 7]

The model under AdamW with float32 master weights; the folder is a temporary one in the working folder. waits: until
`save` returns; blocks: until the same checkpoint is whole. steps: what training steps take while one is being
written, and otherwise: the writer needs a core for checksums.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lengths import on_pairs, training_step
from measure import arguments, circumstances, use, write_results

from drama_dist.distributed.checkpoints import Checkpoints
from drama_dist.distributed.engine import Engine
from drama_dist.train.step import TrainingStep

TEXTS, TOKENS = 64, 128


def measure(step: TrainingStep, rounds: int) -> dict[str, Any]:
    """Medians of the rounds, in seconds; the first of each is not counted."""
    vocabulary = step.encoder.backbone.config.vocab_size
    texts = torch.randint(vocabulary, (TEXTS, TOKENS), generator=torch.Generator().manual_seed(0)).tolist()
    figures: dict[str, list[float]] = {"waits": [], "blocks": [], "step": [], "step_while_writing": []}
    with tempfile.TemporaryDirectory(dir=".") as folder:
        saved = Checkpoints(Path(folder), keep=1)
        for turn in range(rounds + 1):
            figures["step"].append(_seconds(partial(on_pairs, step, texts)))
            figures["waits"].append(_seconds(partial(step.engine.save, saved, 2 * turn)))
            figures["step_while_writing"].append(_seconds(partial(on_pairs, step, texts)))
            saved.wait()
            figures["blocks"].append(_seconds(partial(_blocking, step.engine, saved, 2 * turn + 1)))
        megabytes = sum(file.stat().st_size for file in saved.whole()[-1].iterdir()) / 1e6
    return {name: statistics.median(values[1:]) for name, values in figures.items()} | {
        "slowest_wait": max(figures["waits"][1:]),
        "megabytes": megabytes,
    }


def _blocking(engine: Engine, saved: Checkpoints, step: int) -> None:
    engine.save(saved, step)
    saved.wait()


def _seconds(call: Any) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def table(row: dict[str, Any]) -> str:
    """Markdown."""
    return "\n".join(
        [
            "| MB | waits, s (slowest) | blocks, s | share | step, s | while writing, s |",
            "|--:|--:|--:|--:|--:|--:|",
            f"| {row['megabytes']:.0f} | {row['waits']:.3f} ({row['slowest_wait']:.3f}) | {row['blocks']:.2f} "
            f"| {row['waits'] / row['blocks']:.3f} | {row['step']:.2f} | {row['step_while_writing']:.2f} |",
        ]
    )


def main() -> None:
    options = arguments(__doc__, rounds=7, model=True, devices=("cpu",), dtype=True).parse_args()
    use(options)
    facts = circumstances(options.device)
    row = measure(training_step(options.model, options.dtype, 4096, checkpointed=False), options.rounds)
    name = f"checkpoint-{options.device}-{options.dtype}"
    print(table(row), write_results(name, facts, [row], table(row)), sep="\n")


if __name__ == "__main__":
    main()
