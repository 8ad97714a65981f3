"""`drama plan`: memory, traffic, operations and time of a run's training steps before it is run.

Covers reading what a run will be from its settings, and the report with what would make it fit. The formulas are in
train/cost.py and train/traffic.py, devices in devices.py. Loads no model: shapes come from configurations.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError
from transformers import AutoConfig, LlamaConfig

from drama_dist.distributed.engine import BUCKET
from drama_dist.distributed.precision import AUTO, dtype_name
from drama_dist.encoder.sources import locate
from drama_dist.plan.cost import INDEX, PARTS, SINGLE, Costs, RankShare, Shape, Way, layers_fuse, loss_backend
from drama_dist.plan.devices import Device, device
from drama_dist.plan.traffic import DEEPSPEED, traffic_per_step
from drama_dist.settings import Settings
from drama_dist.train.grad_cache import SHARE_OF_FREE
from drama_dist.train.info_nce_term import gathers_queries

# Of the peak of products, with which a step's operations are done. On the CPU: benchmarks/results/step-cpu-bfloat16.md,
# 31,842 different tokens of four passes in 5.7 s; plan-cpu-bfloat16.md shows how rough that is. On GPUs: assumed.
SHARES_OF_PEAK = {True: 0.6, False: 0.4}
_MOST_RANKS = 4096


@dataclass(frozen=True)
class Plan:
    """lengths_from: where the texts' lengths come from."""

    costs: Costs
    device: Device
    dtype: str
    steps: int
    lengths_from: str

    @property
    def fits(self) -> bool:
        return sum(self.costs.peak[1].values()) <= self.device.memory

    @property
    def seconds(self) -> float:
        """Least seconds of a step: all products at the device's peak, then the traffic."""
        costs, peaks, link = self.costs, self.device.peaks, self.device.link(self.costs.share.ranks)
        loss = costs.loss_operations / (peaks["float32"] if self.device.is_cpu else peaks["tf32"] / 3)
        products = (costs.operations - costs.loss_operations) / peaks[self.dtype]
        return products + loss + (sum(traffic_per_step(costs).values()) / link if link else 0)


def plan(settings: Settings, ranks: int, name: str, shape: Shape | None = None) -> None:
    """Print the plan; shape: of the encoder, where the settings' model cannot be read.

    Raises ValueError where there are more ranks than queries, or no such device.
    """
    found = make_plan(settings, ranks, device(name, ranks), shape or read_shape(settings))
    print("\n".join(report(found)))
    print("\n".join(_verdict(settings, found)))


def make_plan(settings: Settings, ranks: int, on: Device, shape: Shape) -> Plan:
    """The plan of rank 0, whose share of a batch is the largest."""
    train, encoder = settings.train, settings.encoder
    if ranks > train.batch_size:
        raise ValueError(f"{ranks} ranks for train.batch_size={train.batch_size}: each needs a query")
    passages = round(train.batch_size * (1 + train.hard_negatives))
    own = [math.ceil(count / ranks) for count in (train.batch_size, passages)]
    lengths, source = _lengths(settings, own)
    words = min(sum(lengths), shape.vocabulary)
    share = RankShare(ranks, train.batch_size, passages, own[0], own[1], lengths, words, tuple(encoder.dims))
    dtype = dtype_name(train.dtype) if on.is_cpu or train.dtype != AUTO else "bfloat16"
    way = Way(
        size=SINGLE if dtype == "float32" else SINGLE // 2,
        zero=train.zero_stage,
        offload=train.offload_optimizer,
        chunk_tokens=train.chunk_tokens,
        budget=math.inf,
        checkpoint_layers=train.checkpoint_layers,
        queries_travel=ranks > 1 and gathers_queries(train.batch_size, passages, shape.hidden, encoder, train),
        loss=loss_backend(not on.is_cpu),
        fused=on.is_cpu and layers_fuse(shape),
        bucket=BUCKET,
        threads=torch.get_num_threads(),
    )
    costs = Costs(shape, share, replace(way, budget=_budget(Costs(shape, share, way), train.activation_budget, on)))
    return Plan(costs, on, dtype, train.steps, source)


def read_shape(settings: Settings) -> Shape:
    """The encoder's shape: of train.start, or of the LLM pruned as the prune section says."""
    config = _config(settings.train.start or settings.llm)
    if settings.train.start:
        heads = config.num_attention_heads, config.num_key_value_heads
        return Shape(
            config.vocab_size,
            config.hidden_size,
            config.num_hidden_layers,
            *heads,
            config.head_dim,
            config.intermediate_size,
        )
    return pruned_shape(settings, config.vocab_size, config.head_dim)


def pruned_shape(settings: Settings, vocabulary: int, head: int) -> Shape:
    """What pruning makes of an LLM with so many words and components of a head."""
    cut = settings.prune
    return Shape(vocabulary, cut.hidden, cut.layers, cut.heads, cut.heads, head, cut.mlp)


def report(plan: Plan) -> Iterator[str]:
    """Lines: what is planned, memory, traffic, operations and time."""
    costs, share = plan.costs, plan.costs.share
    shape = costs.shape
    yield f"Computed for rank 0 of {share.ranks} on {plan.device.name} ({plan.device.source})."
    yield (
        f"parameters  {shape.parameters / 1e6:.1f} million: words {shape.word_parameters / 1e6:.1f}, "
        f"layers {shape.layer_parameters / 1e6:.1f}"
    )
    twice = costs.recomputed_tokens / costs.tokens
    yield (
        f"step        {share.own_queries} of {share.queries} queries, {share.own_passages} of {share.passages} "
        f"passages; {costs.tokens:,} tokens in {len(costs.chunks)} chunks, {twice:.0%} of them encoded twice"
    )
    yield f"lengths     {plan.lengths_from}"
    yield from _memory_table(costs)
    yield from _traffic_lines(costs)
    yield from _time_lines(plan)


def _memory_table(costs: Costs) -> Iterator[str]:
    phases = costs.phases
    yield f"\n{'GiB':<14}" + "".join(f"{name:>11}" for name in phases)
    for part in (*PARTS, "all"):
        sizes = [sum(memory.values()) if part == "all" else memory[part] for memory in phases.values()]
        if any(sizes):
            yield f"{part:<14}" + "".join(f"{size / 2**30:>11.3f}" for size in sizes)
    yield f"peak while {costs.peak[0]}; beside it the libraries' own memory (on a GPU: CUDA's context, NCCL's buffers)"
    if costs.offloads:
        yield f"in the machine's memory, for each rank: {costs.offloaded_bytes / 2**30:.3f} GiB"


def _traffic_lines(costs: Costs) -> Iterator[str]:
    sent = traffic_per_step(costs)
    if not sent:
        yield "\ntraffic     none: one rank"
        return
    yield f"\nMB sent by a rank in a step; {'queries' if costs.way.queries_travel else 'passages'} travel"
    for kind, count in sent.items():
        yield f"{kind:<18}{count / 1e6:>12.3f}{'  by DeepSpeed' if kind in DEEPSPEED else ''}"
    yield f"{'all':<18}{sum(sent.values()) / 1e6:>12.3f}"


def _time_lines(plan: Plan) -> Iterator[str]:
    share = SHARES_OF_PEAK[plan.device.is_cpu]
    expected, peak = plan.seconds / share, plan.device.peaks[plan.dtype] / 1e12
    timed = "as in benchmarks/results/step-cpu-bfloat16.md"
    reason = timed if plan.device.is_cpu else "assumed: nothing was timed on such a device"
    yield f"\noperations  {plan.costs.operations / 1e12:.2f} Tflop a step and rank"
    yield f"time        at least {_duration(plan.seconds)} a step, at {peak:.3g} Tflop/s"
    yield (
        f"            expected {_duration(expected)} at {share:.0%} of that ({reason}); "
        f"{plan.steps} steps: {_duration(expected * plan.steps)}"
    )


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.3g} s"


def _verdict(settings: Settings, plan: Plan) -> Iterator[str]:
    peak, memory = (size / 2**30 for size in (sum(plan.costs.peak[1].values()), plan.device.memory))
    if plan.fits:
        yield f"\nfits: {peak:.2f} of {memory:.1f} GiB"
        return
    part = max(plan.costs.peak[1], key=lambda name: plan.costs.peak[1][name])
    yield f"\ndoes not fit: {peak:.2f} GiB of {memory:.1f}; most of it is {part}, while {plan.costs.peak[0]}"
    changes = what_fits(settings, plan)
    yield f"would fit with: {' '.join(changes)}" if changes else "nothing in the settings makes it fit: prune further"


def what_fits(settings: Settings, plan: Plan) -> list[str]:
    """Settings that together make it fit, cheapest in time first, none without need; empty where nothing does."""
    chosen: list[tuple[str, object]] = []
    for change in _changes(settings, plan):
        chosen.append(change)
        if _fits_with(settings, plan, chosen):
            needed = list(chosen)
            for one in reversed(chosen[:-1]):
                rest = [other for other in needed if other is not one]
                needed = rest if _fits_with(settings, plan, rest) else needed
            last = {key: value for key, value in needed}  # a later value of a key replaces an earlier one
            return [f"--ranks {value}" if key == "ranks" else f"train.{key}={value}" for key, value in last.items()]
    return []


def _changes(settings: Settings, plan: Plan) -> Iterator[tuple[str, object]]:
    train, ranks = settings.train, plan.costs.share.ranks
    if train.activation_budget not in ("auto", 0):
        yield "activation_budget", "auto"
    if train.activation_budget != 0:
        yield "activation_budget", 0
    tokens, longest = train.chunk_tokens, max(plan.costs.share.lengths)
    while tokens // 2 >= longest:
        tokens //= 2
        yield "chunk_tokens", tokens
    if not train.checkpoint_layers:
        yield "checkpoint_layers", True
    stages = range(train.zero_stage + 1, 4)
    if ranks > 1 or not train.zero_stage:
        yield from (("zero_stage", stage) for stage in stages[: None if ranks > 1 else 1])
    if not plan.device.is_cpu and not train.offload_optimizer:
        yield "offload_optimizer", True
    while not plan.device.is_cpu and ranks * 2 <= min(train.batch_size, _MOST_RANKS):
        ranks *= 2
        yield "ranks", ranks
        if plan.costs.share.ranks == 1:
            yield from (("zero_stage", stage) for stage in stages)


def _fits_with(settings: Settings, plan: Plan, changes: Sequence[tuple[str, object]]) -> bool:
    values = dict(changes)
    ranks = int(str(values.pop("ranks", plan.costs.share.ranks)))
    try:
        changed = replace(settings, train=replace(settings.train, **values))  # type: ignore[arg-type]
    except ValidationError:  # changes that do not go together
        return False
    return make_plan(changed, ranks, plan.device, plan.costs.shape).fits


def _budget(costs: Costs, wanted: float | str, on: Device) -> float:
    """Bytes for kept graphs; "auto" as GradCache does: a share of what the first, longest chunk leaves free."""
    if wanted != "auto":
        return float(wanted) * 2**30
    chunk = max(costs.chunks) * costs.graph_bytes
    held = sum(costs.state.values()) + chunk + costs.way.size * costs.share.words * costs.shape.hidden
    return max(0.0, SHARE_OF_FREE * (on.memory - held - INDEX * costs.shape.vocabulary))


def _lengths(settings: Settings, counts: Sequence[int]) -> tuple[tuple[int, ...], str]:
    """Tokens of so many queries and passages, and where they come from."""
    encoder = settings.encoder
    for stage in ("train", "train.partial"):
        path = Path(settings.run) / stage / "token_lengths.json"
        if path.exists():
            seen = json.loads(path.read_text("utf-8"))
            edges = np.array(seen["edges"])
            drawn = [
                _quantiles(np.array(seen[kind]), edges, n)
                for kind, n in zip(("queries", "passages"), counts, strict=True)
            ]
            return (*drawn[0], *drawn[1]), f"as in {path}"
    limits = encoder.max_query_tokens, encoder.max_passage_tokens
    texts = (limits[0],) * counts[0] + (limits[1],) * counts[1]
    return texts, "the limits encoder.max_query_tokens and max_passage_tokens: an upper bound"


def _quantiles(counts: np.ndarray, edges: np.ndarray, number: int) -> list[int]:
    """So many lengths that are spread like a histogram's."""
    below = np.concatenate([[0], counts.cumsum()]) / counts.sum()
    places = (np.arange(number) + 0.5) / number
    return [max(1, round(length)) for length in np.interp(places, below, edges)]


def _config(name: str) -> LlamaConfig:
    found = locate(name)
    place = {"gguf_file": found.name} if isinstance(found, Path) and found.is_file() else {}
    folder = found.parent if place and isinstance(found, Path) else found
    try:
        config = AutoConfig.from_pretrained(folder, **place)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: its configuration cannot be read; say --vocabulary and --head instead") from error
    if not isinstance(config, LlamaConfig):
        raise ValueError(f"{name}: model type {config.model_type!r}; the encoder takes Llama-type models")
    return config
