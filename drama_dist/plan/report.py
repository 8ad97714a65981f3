"""`drama plan`: memory, traffic, operations and time of a run's training steps before it is run.

Covers reading what a run will be from its settings, the report, and what would make it fit. The formulas are in cost.py
and traffic.py, devices in devices.py. Loads no model: shapes come from configurations.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from transformers import AutoConfig, LlamaConfig

from drama_dist.distributed.precision import AUTO
from drama_dist.encoder.failures import named_by, told_as
from drama_dist.encoder.families import Config
from drama_dist.encoder.pretrained import llama_config, read_llama_config
from drama_dist.encoder.sources import locate, reachable
from drama_dist.plan.cost import PARTS, StepCost, largest_share, passages_of_batch
from drama_dist.plan.devices import Device, device
from drama_dist.plan.traffic import DEEPSPEED, traffic_per_step
from drama_dist.prune.shape import Shape, as_config, requested_shape, shape_of
from drama_dist.settings import Settings, SettingsError, TrainSettings

# Of the peak of products, with which a step's operations are done. On the CPU: benchmarks/results/step-cpu-bfloat16.md,
# 31,842 different tokens of four passes in 5.7 s; plan-cpu-bfloat16.md shows how rough that is. On GPUs: assumed.
SHARE_OF_CPU_PEAK, SHARE_OF_GPU_PEAK = 0.6, 0.4
_MOST_RANKS = 4096
Change = tuple[str, Any]  # a key of the train section, or "ranks", and its value


def plan(settings: Settings, ranks: int, name: str, shape: Config | None = None) -> None:
    """Print the plan for a device; shape: of the encoder, where the settings' model cannot be read.

    Raises ValueError where there are more ranks than queries, or no such device.
    """
    cost = step_cost(settings, ranks, device(name, ranks), shape or read_shape(settings))
    print("\n".join(report(cost)))
    if not settings.train.start and settings.prune.vocabulary != "whole":
        kept = f"prune.vocabulary={settings.prune.vocabulary}"
        print(f"\nembeddings  of all the LLM's tokens: {kept} keeps fewer, so that memory, traffic and time are less")
    print("\n".join(_verdict(settings, cost)))


def step_cost(settings: Settings, ranks: int, on: Device, shape: Config) -> StepCost:
    """What a step of rank 0 costs. Raises ValueError where there are more ranks than queries."""
    train = settings.train
    if ranks > train.batch_size:
        raise ValueError(f"{ranks} ranks for train.batch_size={train.batch_size}: each needs a query")
    shape = copy(shape)
    shape.vocab_size += train.superwords
    shares = [largest_share(texts, ranks) for texts in (train.batch_size, passages_of_batch(train))]
    lengths, lengths_from = _lengths(settings, *shares)
    return StepCost(shape, settings.encoder, train, ranks, on, lengths, lengths_from)


def read_shape(settings: Settings) -> Config:
    """The encoder's shape: of train.start, or of the LLM pruned as the prune section says, but with all its tokens."""
    if settings.train.start:
        return _read_config("train.start", settings.train.start)
    try:
        config = _read_config("llm", settings.llm)
    except SettingsError as error:
        raise SettingsError(f"{error}; to plan without it, say --vocabulary and --head instead") from error
    return _pruned(settings, config)


def pruned_shape(settings: Settings, vocabulary: int, head: int) -> Config:
    """What pruning makes of an LLM of which only the number of tokens and the components of a head are known.

    Raises SettingsError where the prune section keeps something that is not known.
    """
    kept = {part.name: getattr(settings.prune, part.name) for part in fields(Shape) if part.name != "kv_heads"}
    for name, size in kept.items():
        if size is None:
            raise SettingsError(
                f"prune.{name}=null depends on the LLM's shape, which --vocabulary and --head do not tell; give it a "
                "number"
            )
    groups = settings.prune.kv_heads or kept["heads"]
    llm = as_config(Shape(**kept, kv_heads=groups), LlamaConfig(vocab_size=vocabulary, head_dim=head))
    return _pruned(settings, llm)


def _pruned(settings: Settings, config: Config) -> Config:
    return as_config(requested_shape(settings.prune, config), config)


def report(cost: StepCost) -> Iterator[str]:
    """Lines: what is planned, memory, traffic, operations and time."""
    yield f"Computed for rank 0 of {cost.ranks} on {cost.device.name} ({cost.device.source})."
    shape = shape_of(cost.config)
    yield (
        f"shape       {shape.layers} layers of {shape.hidden}, {shape.heads} heads over {shape.kv_heads} key-value "
        f"heads, MLP {shape.mlp}"
    )
    yield (
        f"parameters  {cost.parameters / 1e6:.1f} million: embeddings {cost.embedding_parameters / 1e6:.1f}, "
        f"layers {cost.layer_parameters / 1e6:.1f}"
        + (f", linear head {cost.head_parameters / 1e6:.1f}" if cost.head_parameters else "")
    )
    queries, passages = (f"{largest_share(count, cost.ranks)} of {count}" for count in cost.batch)
    yield (
        f"step        {queries} queries, {passages} passages; {cost.tokens:,} tokens in {len(cost.chunks)} chunks, "
        f"{1 - cost.kept_tokens / cost.tokens:.0%} of them encoded twice"
    )
    yield f"lengths     {cost.lengths_from}"
    if cost.train.soft_target_weight:
        yield "left out    soft targets: about the time and memory of the loss once more"
    yield from _memory_lines(cost)
    yield from _traffic_lines(cost)
    yield from _time_lines(cost)


def _memory_lines(cost: StepCost) -> Iterator[str]:
    phases = cost.phases
    yield f"\n{'GiB':<14}" + "".join(f"{name:>11}" for name in phases)
    for part in PARTS:
        if any(memory[part] for memory in phases.values()):
            yield f"{part:<14}" + "".join(f"{memory[part] / 2**30:>11.3f}" for memory in phases.values())
    yield f"{'all':<14}" + "".join(f"{memory.total() / 2**30:>11.3f}" for memory in phases.values())
    yield f"peak: {cost.peak[0]}; beside it the libraries' own memory (on a GPU: CUDA's context, NCCL's buffers)"
    if cost.offloaded_bytes:
        yield f"in the machine's memory, for each rank: {cost.offloaded_bytes / 2**30:.3f} GiB"


def _traffic_lines(cost: StepCost) -> Iterator[str]:
    sent = traffic_per_step(cost)
    if not sent:
        yield "\ntraffic     none: one rank"
        return
    yield f"\nMB sent by a rank in a step; {'queries' if cost.gathers_queries else 'passages'} are gathered"
    for kind, count in sent.items():
        yield f"{kind:<18}{count / 1e6:>12.3f}{'  by DeepSpeed' if kind in DEEPSPEED else ''}"
    yield f"{'all':<18}{sum(sent.values()) / 1e6:>12.3f}"


def least_seconds(cost: StepCost) -> float:
    """Of a step: all products at the device's peak, then the traffic."""
    on = cost.device
    loss = cost.loss_operations / (on.peaks["float32"] if on.is_cpu else on.peaks["tf32"] / 3)
    products = (cost.operations - cost.loss_operations) / on.peaks[cost.dtype]
    return products + loss + on.seconds_to_send(sum(traffic_per_step(cost).values()), cost.ranks)


def _time_lines(cost: StepCost) -> Iterator[str]:
    share, reason = SHARE_OF_GPU_PEAK, "assumed: nothing was timed on such a device"
    if cost.device.is_cpu:
        share, reason = SHARE_OF_CPU_PEAK, "as in benchmarks/results/step-cpu-bfloat16.md"
    least = least_seconds(cost)
    expected = least / share
    yield f"\noperations  {cost.operations / 1e12:.2f} Tflop a step and rank"
    yield f"time        at least {_duration(least)} a step, at {cost.device.peaks[cost.dtype] / 1e12:.3g} Tflop/s"
    yield (
        f"            expected {_duration(expected)} at {share:.0%} of that ({reason}); {_length(cost.train, expected)}"
    )


def _length(train: TrainSettings, seconds: float) -> str:
    """Of the training, whose steps take so many seconds each."""
    if train.minutes is not None:
        return f"{_duration(60 * train.minutes)}: {max(1, round(60 * train.minutes / seconds))} steps"
    assert train.steps is not None
    return f"{train.steps} steps: {_duration(seconds * train.steps)}"


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.3g} s"


def _verdict(settings: Settings, cost: StepCost) -> Iterator[str]:
    phase, parts = cost.peak
    peak, memory, part = parts.total() / 2**30, cost.device.memory / 2**30, parts.most_common(1)[0][0]
    if cost.fits:
        yield f"\nfits: {peak:.2f} of {memory:.1f} GiB"
        return
    yield f"\ndoes not fit: {peak:.2f} GiB of {memory:.1f}; most of it is {part} (phase: {phase})"
    changes = what_fits(settings, cost)
    yield f"would fit with: {' '.join(changes)}" if changes else "nothing in the settings makes it fit: prune further"


def what_fits(settings: Settings, cost: StepCost) -> list[str]:
    """Settings that together make it fit, cheapest in time first, none without need; empty where nothing does."""
    changes: list[Change] = []
    for change in _changes(cost):
        changes.append(change)
        if _fits_with(settings, cost, changes):
            for earlier in changes[-2::-1]:
                rest = [other for other in changes if other is not earlier]
                changes = rest if _fits_with(settings, cost, rest) else changes
            last = dict(changes)
            return [f"--ranks {last[key]}" if key == "ranks" else f"train.{key}={last[key]}" for key in last]
    return []


def _changes(cost: StepCost) -> Iterator[Change]:
    """Each adds to those before; a later value of a key replaces an earlier one."""
    train, ranks, on_gpu = cost.train, cost.ranks, not cost.device.is_cpu
    if train.activation_budget not in (AUTO, 0):
        yield "activation_budget", AUTO
    if train.activation_budget != 0:
        yield "activation_budget", 0
    tokens = train.chunk_tokens // 2
    while tokens >= max(cost.lengths):
        yield "chunk_tokens", tokens
        tokens //= 2
    yield "checkpoint_layers", True
    stages = [("zero_stage", stage) for stage in range(train.zero_stage + 1, 4)]
    yield from stages if ranks > 1 else stages[: train.zero_stage == 0]  # on one rank nothing is split
    if on_gpu:
        yield "offload_optimizer", True
    while on_gpu and 2 * ranks <= min(train.batch_size, _MOST_RANKS):
        ranks *= 2
        yield "ranks", ranks
        yield from stages if cost.ranks == 1 else ()


def _fits_with(settings: Settings, cost: StepCost, changes: Sequence[Change]) -> bool:
    values = {"ranks": cost.ranks, **dict(changes)}
    ranks = values.pop("ranks")
    try:
        changed = replace(settings, train=replace(settings.train, **values))
    except ValidationError:  # changes that do not go together
        return False
    return step_cost(changed, ranks, cost.device, cost.config).fits


def _lengths(settings: Settings, queries: int, passages: int) -> tuple[tuple[int, ...], str]:
    """Tokens of so many queries and passages, and where they come from."""
    for stage in ("train", "train.partial"):
        path = Path(settings.run) / stage / "token_lengths.json"
        if path.exists():
            seen = json.loads(path.read_text("utf-8"))
            counts = {"queries": queries, "passages": passages}
            drawn = [_quantiles(seen[kind], seen["edges"], count) for kind, count in counts.items()]
            return (*drawn[0], *drawn[1]), f"as in {path}"
    limits = settings.encoder.max_query_tokens, settings.encoder.max_passage_tokens
    texts = (limits[0],) * queries + (limits[1],) * passages
    return texts, "the limits encoder.max_query_tokens and max_passage_tokens: an upper bound"


def _quantiles(histogram: Sequence[int], edges: Sequence[float], count: int) -> list[int]:
    """So many lengths that are spread like a histogram's."""
    below = np.cumsum([0, *histogram]) / sum(histogram)
    lengths = np.interp((np.arange(count) + 0.5) / count, below, edges)
    return [max(1, round(length)) for length in lengths]


def _read_config(setting: str, name: str) -> Config:
    """Of a GGUF file, too, which need not be converted for that; raises SettingsError."""
    with named_by(setting, name):
        source = Path(reachable(str(locate(name))))
        if not source.is_file():
            return read_llama_config(str(source))
        with told_as("its configuration cannot be read"):
            stored = AutoConfig.from_pretrained(str(source.parent), trust_remote_code=False, gguf_file=source.name)
        return llama_config(str(source), stored)
