"""A whole training step: ours against sentence-transformers, on the same checkpoint and the same texts.

python benchmarks/step.py --data DIR [--model runs/quickstart/export] [--sets questions abstracts]
    [--batches 256 1024] [--budgets 0 4] [--dtype auto] [--dtypes bfloat16 float32] [--rounds 5]

A step is everything from texts to updated weights: tokens, embeddings, the loss over all Matryoshka dims,
gradients, clipping, AdamW. The learning rate is 0, so every round does the same work. Peers:
CachedMultipleNegativesRankingLoss under MatryoshkaLoss, in float32 and under bfloat16 autocast, at the
mini-batches of PEERS, of which one round over TRIED texts finds the fastest for each precision. Ours: with a budget of
so many GiB for kept graphs; with 0 every chunk is encoded twice, as the peer does. Tokens are those of the texts,
padding not counted. Ours encodes a text once that a batch holds twice; the table counts both ways. Memory is what
a side adds at its peak, weights and optimiser included, in two steps, on CPUs in a process of its own.
--dtype: ours, and the peer's that it is held against; part of the results file's name. --dtypes: all of the peer's that
are timed. In float32 both sides are compared once in any case, over EXACT queries at most.
Rows of the results file that are of other texts, batches or processors stay.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from measure import (
    DTYPES,
    Measured,
    add_row,
    alone_megabytes,
    arguments,
    as_row,
    by_run,
    circumstances,
    earlier_rows,
    in_turns,
    rate_of,
    use,
    write_rows,
)
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss
from texts import Texts, abstracts, questions

from drama_dist.distributed import ranks
from drama_dist.encoder.backbone import load
from drama_dist.settings import TrainSettings
from drama_dist.train.step import TrainingStep
from drama_dist.train.term import Relevance

TEMPERATURE = 0.05
CLIPPING = 1.0
TRIED = 64
EXACT = 256
LIMIT = 512  # tokens of a text
PEERS = {
    "cpu": (  # the last of each is what float32 is compared with once
        {"mini_batch_size": 32},
        {"mini_batch_size": 8},
        {"mini_batch_size": 128, "mini_batch_num_tokens": 1024},
        {"mini_batch_size": 128, "mini_batch_num_tokens": 4096},
    ),
    "cuda": (
        {"mini_batch_size": 128},
        {"mini_batch_size": 512, "mini_batch_num_tokens": 4096},
        {"mini_batch_size": 512, "mini_batch_num_tokens": 16384},  # in float32 a mask of so many squared for each layer
        {"mini_batch_size": 32},
    ),
}
AGREEMENT = {"float32": 1e-3, "bfloat16": 0.1}  # of the loss and of the gradient's norm, relative


@dataclass(frozen=True)
class Result:
    """Of a step: loss, the gradient's norm, real tokens, and how many of them were encoded."""

    loss: float
    norm: float
    tokens: int
    encoded: int


Step = Callable[[Texts], Result]


def ours(model: Path, dtype: str, chunk_tokens: int, budget: float) -> Step:
    """The training loop's step; budget: GiB for kept graphs."""
    encoder = load(model)
    encoder.contract = replace(encoder.contract, max_query_tokens=LIMIT, max_passage_tokens=LIMIT)
    training_step = TrainingStep(
        encoder,
        TrainSettings(
            dtype=dtype,
            temperature=TEMPERATURE,
            gradient_clipping=CLIPPING,
            chunk_tokens=chunk_tokens,
            activation_budget=budget,
        ),
    )

    def step(texts: Texts) -> Result:
        queries, passages = encoder.tokenize_queries(texts.queries), encoder.tokenize_passages(texts.passages)
        every_column_counts = torch.arange(len(passages))  # also of equal texts, as for the peer
        relevance = Relevance(torch.arange(len(queries)), every_column_counts)
        result = training_step.of_tokens(queries, passages, relevance, learning_rate=0.0)
        tokens = sum(map(len, [*queries, *passages]))
        return Result(result.objective.loss, result.gradient_norm, tokens, sum(result.lengths))

    return step


def theirs(model: Path, dtype: str, mini_batch: dict[str, int]) -> Step:
    """sentence-transformers, as its trainer calls it."""
    encoder = SentenceTransformer(str(model), device=str(ranks.device()), trust_remote_code=False)
    encoder.max_seq_length = LIMIT
    encoder.train()
    cached = CachedMultipleNegativesRankingLoss(encoder, scale=1 / TEMPERATURE, **mini_batch)
    dims = load(model).contract.dims
    loss = MatryoshkaLoss(encoder, cached, dims, [1 / len(dims)] * len(dims))
    optimiser = torch.optim.AdamW(encoder.parameters(), lr=0.0, weight_decay=0.01, fused=True)  # as its trainer does

    def step(texts: Texts) -> Result:
        queries = [encoder.prompts["query"] + text for text in texts.queries]
        features = [encoder.preprocess(queries), *(encoder.preprocess(column) for column in texts.columns)]
        tokens = sum(int(feature["attention_mask"].sum()) for feature in features)
        features = [
            {
                key: value.to(encoder.device) if isinstance(value, torch.Tensor) else value
                for key, value in column.items()
            }
            for column in features
        ]
        optimiser.zero_grad()
        narrow = (
            torch.autocast(encoder.device.type, torch.bfloat16) if dtype == "bfloat16" else contextlib.nullcontext()
        )
        with narrow:
            value = loss(features, torch.empty(0))
            value.backward()
        norm = torch.nn.utils.clip_grad_norm_(encoder.parameters(), CLIPPING)
        optimiser.step()
        return Result(float(value.detach()), float(norm), tokens, tokens)

    return step


def measure(texts: Texts, options: argparse.Namespace) -> dict[str, Any]:
    """One line of the table."""
    our_sides = {
        f"ours {options.dtype}, {budget:g} GiB kept": partial(
            ours, options.model, options.dtype, options.chunk_tokens, budget
        )
        for budget in options.budgets
    }
    tried = {dtype: _tried(texts.first(TRIED), dtype, options) for dtype in options.dtypes}
    best = {dtype: min(timed, key=lambda name: timed[name].seconds) for dtype, timed in tried.items()}
    peers = {best[dtype]: _peers(dtype, options)[best[dtype]] for dtype in options.dtypes}
    exact = {
        "ours float32": ours(options.model, "float32", options.chunk_tokens, 0.0)(texts.first(EXACT)),
        "peer float32": theirs(options.model, "float32", PEERS[options.device][-1])(texts.first(EXACT)),
    }
    makes = our_sides | peers
    megabytes = {name: alone_megabytes(partial(_prepared, make, texts), options.device) for name, make in makes.items()}
    steps = {name: partial(make(), texts) for name, make in makes.items()}
    results = {name: step() for name, step in steps.items()}  # the round that does not count
    measured = in_turns(steps, options.rounds, options.device, warm_up=0)
    first, peer = results[next(iter(our_sides))], best[options.dtype]
    return {
        "texts": texts.name,
        "batch": len(texts.queries),
        "tokens": first.tokens,
        "distinct_tokens": first.encoded,
        "tried": {name: as_row(value) for timed in tried.values() for name, value in timed.items()},
        "measured": {name: as_row(replace(value, megabytes=megabytes[name])) for name, value in measured.items()},
        "results": {name: asdict(result) for name, result in (results | exact).items()},
        "agree": _agree(*exact.values(), "float32")
        and all(_agree(results[name], results[peer], options.dtype) for name in our_sides),
        "best_peer": peer,
    }


def _peers(dtype: str, options: argparse.Namespace) -> dict[str, Callable[[], Step]]:
    return {_name(dtype, peer): partial(theirs, options.model, dtype, peer) for peer in PEERS[options.device]}


def _tried(texts: Texts, dtype: str, options: argparse.Namespace) -> dict[str, Measured]:
    """One round of each of the peer's settings, each with a model of its own."""
    timed = {}
    for name, make in _peers(dtype, options).items():
        timed |= in_turns({name: partial(make(), texts)}, 1, options.device)
    return timed


def _prepared(make: Callable[[], Step], texts: Texts) -> Callable[[], object]:
    """Steps that make the model in the first of them."""
    os.environ.pop("MASTER_PORT", None)  # the first process listens there
    make()(texts.first(1))  # what a first step takes once in a process: imports and the like
    made = cache(make)
    return lambda: made()(texts)


def _name(dtype: str, peer: dict[str, int]) -> str:
    size = f"{peer['mini_batch_num_tokens']} tokens" if "mini_batch_num_tokens" in peer else peer["mini_batch_size"]
    return f"peer {dtype}, mini-batch {size}"


def _agree(result: Result, other: Result, dtype: str) -> bool:
    pairs = (result.loss, other.loss), (result.norm, other.norm)
    return result.tokens == other.tokens and all(abs(one - two) <= AGREEMENT[dtype] * abs(two) for one, two in pairs)


LEGEND = """Real tokens a second: median (slowest–fastest round). MB: peak of all that the side adds, on CPUs alone
in a process. times: the side's rate over that of the peer's fastest setting at our precision; encoded: the same with
the tokens that each side encodes, texts that come twice counted once for ours; memory: MB over that peer's."""


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: real tokens a second, and peak memory."""
    lines = [
        "| texts | batch | real tokens (distinct) | side | tokens/s | MB | times | encoded | memory | loss "
        "| gradient norm |",
        "|---|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        peer = row["measured"][row["best_peer"]]
        for name, value in row["measured"].items():
            measured = Measured(**value)
            times = peer["seconds"] / measured.seconds
            encoded = times * row["distinct_tokens"] / row["tokens"] if name.startswith("ours") else times
            memory = measured.megabytes / peer["megabytes"]
            ratios = [f"{ratio:.2f}" if row["agree"] else "no agreement" for ratio in (times, encoded, memory)]
            result = row["results"][name]
            lines.append(
                f"| {row['texts']} | {row['batch']} | {row['tokens']} ({row['distinct_tokens']}) | {name} "
                f"| {rate_of(row['tokens'], measured)} | {measured.megabytes:.0f} | {' | '.join(ratios)} "
                f"| {result['loss']:.4f} | {result['norm']:.4f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__, data="xquad-en/ and cisi/", model=True, dtype=True)
    parser.add_argument("--sets", nargs="+", choices=["questions", "abstracts"], default=["questions", "abstracts"])
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.0, 4.0], help="GiB of kept graphs")
    parser.add_argument("--chunk-tokens", type=int, default=2048)
    parser.add_argument("--dtypes", nargs="*", choices=DTYPES, help="of the peer, timed; default: ours and float32")
    options = parser.parse_args()
    use(options)
    options.dtypes = options.dtypes or list(dict.fromkeys([options.dtype, "float32"]))
    if options.dtype not in options.dtypes:
        parser.error(f"--dtypes: expected {options.dtype} among them, which the table compares with")
    name, facts = f"step-{options.device}-{options.dtype}", circumstances(options.device)
    rows = earlier_rows(name)
    for batch in options.batches:
        for name_of_set in options.sets:
            texts = questions(options.data, batch) if name_of_set == "questions" else abstracts(options.data, batch)
            add_row(rows, measure(texts, options), facts, "texts", "batch")
            path = write_rows(name, rows, LEGEND, table)
    print(by_run(rows, table), path, sep="\n")


if __name__ == "__main__":
    main()
