"""A whole training step: ours against sentence-transformers, on the same checkpoint and the same texts.

python benchmarks/step.py --data DIR [--model runs/quickstart/export] [--sets questions abstracts]
    [--batches 256 1024] [--budgets 0 4] [--dtype auto] [--dtypes bfloat16 float32] [--rounds 5] [--add]

A step is everything from texts to updated weights: tokens, embeddings, the loss over all Matryoshka dims,
gradients, clipping, AdamW. The learning rate is 0, so every round does the same work. Peers:
CachedMultipleNegativesRankingLoss under MatryoshkaLoss, in float32 and under bfloat16 autocast, at the
mini-batches of PEERS, of which one round over TRIED texts finds the fastest for each precision. Ours: with a budget of
so many GiB for kept graphs; with 0 every chunk is encoded twice, as the peer does. Tokens are those of the texts,
padding not counted. Ours encodes a text once that a batch holds twice; the table counts both ways. Memory is all that
a side adds to the process: weights, optimiser, and the peak of a step.
--dtype: ours, and the peer's that it is held against; part of the results file's name. --dtypes: all of the peer's that
are timed; in float32 both sides are compared once in any case.
--add: rows of the results file with other texts or batches stay.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import (
    DTYPES,
    Measured,
    arguments,
    as_row,
    circumstances,
    earlier_rows,
    held_megabytes,
    in_turns,
    rate_of,
    use,
    write_results,
)
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss
from texts import Texts, abstracts, questions

from drama_dist import ranks
from drama_dist.encoder.backbone import load
from drama_dist.engine import Engine, OptimiserSettings
from drama_dist.settings import TrainSettings
from drama_dist.train.grad_cache import GradCache
from drama_dist.train.objective import contrastive_objective

TEMPERATURE = 0.05
CLIPPING = 1.0
TRIED = 64
LIMIT = 512  # tokens of a text
PEERS = (
    {"mini_batch_size": 32},
    {"mini_batch_size": 8},
    {"mini_batch_size": 128, "mini_batch_num_tokens": 1024},
    {"mini_batch_size": 128, "mini_batch_num_tokens": 4096},
)
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
    """The training loop's own parts; budget: bytes for kept graphs."""
    encoder = load(model)
    encoder.contract = replace(encoder.contract, max_query_tokens=LIMIT, max_passage_tokens=LIMIT)
    engine = Engine(encoder, OptimiserSettings(dtype, 1, 0.01, CLIPPING))
    cache = GradCache(encoder, engine, chunk_tokens, budget)
    train = TrainSettings(temperature=TEMPERATURE)

    def step(texts: Texts) -> Result:
        sequences = encoder.tokenize_queries(texts.queries) + encoder.tokenize_passages(texts.passages)
        encoded = cache.encode(sequences)
        count, device = len(texts.queries), encoder.device
        objective = contrastive_objective(
            encoded.embeddings_NK[:count],
            encoded.embeddings_NK[count:],
            torch.arange(count, device=device),
            torch.arange(len(texts.passages), device=device),  # every column counts, as for the peer
            encoder.contract,
            train,
        )
        cache.backward(torch.cat([objective.query_gradient_BK, objective.passage_gradient_NK]))
        return Result(objective.loss, engine.step(0.0), sum(map(len, sequences)), sum(encoded.lengths))

    return step


def theirs(model: Path, dtype: str, mini_batch: dict[str, int]) -> Step:
    """sentence-transformers, as its trainer calls it."""
    encoder = SentenceTransformer(str(model), device=str(ranks.device()))
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
            {key: value.to(encoder.device) if isinstance(value, torch.Tensor) else value for key, value in one.items()}
            for one in features
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
    few = texts.first(TRIED)
    calls = {
        _name(dtype, peer): partial(theirs, options.model, dtype, peer) for dtype in options.dtypes for peer in PEERS
    }
    tried = {name: _tried(make, few, options.device) for name, make in calls.items()}
    best = {
        dtype: min((name for name in calls if dtype in name), key=lambda n: tried[n].seconds)
        for dtype in options.dtypes
    }
    own = {
        _own_name(options.dtype, budget): partial(
            ours, options.model, options.dtype, options.chunk_tokens, budget * 2**30
        )
        for budget in options.budgets
    }
    makes = own | {best[dtype]: calls[best[dtype]] for dtype in options.dtypes}
    results = {
        "ours float32": (exact := ours(options.model, "float32", options.chunk_tokens, 0.0)(texts)),
        "peer float32": (peer := theirs(options.model, "float32", PEERS[-1])(texts)),
    }
    sides, state = {}, {}
    for make in own.values():
        make()(few)  # what a first step takes once in a process, the tried peers have taken
    for name, make in makes.items():
        before = held_megabytes(options.device)
        sides[name] = make()
        results[name] = sides[name](texts)  # the round that does not count
        state[name] = held_megabytes(options.device) - before
    steps = {name: partial(step, texts) for name, step in sides.items()}
    measured = in_turns(steps, options.rounds, options.device, warm_up=0)
    return {
        "texts": texts.name,
        "batch": len(texts.queries),
        "tokens": exact.tokens,
        "distinct_tokens": exact.encoded,
        "tried": {name: as_row(value) for name, value in tried.items()},
        "measured": {name: as_row(value) | {"state_megabytes": state[name]} for name, value in measured.items()},
        "results": {name: asdict(one) for name, one in results.items()},
        "agree": _agree(exact, peer, "float32")
        and all(_agree(results[name], results[best[options.dtype]], options.dtype) for name in own),
        "best_peer": best[options.dtype],
    }


def _tried(make: Callable[[], Step], texts: Texts, device: str) -> Measured:
    step = make()
    return in_turns({"one": partial(step, texts)}, 1, device)["one"]


def _own_name(dtype: str, budget: float) -> str:
    return f"ours {dtype}, {budget:g} GiB kept"


def _name(dtype: str, peer: dict[str, int]) -> str:
    size = f"{peer['mini_batch_num_tokens']} tokens" if "mini_batch_num_tokens" in peer else peer["mini_batch_size"]
    return f"peer {dtype}, mini-batch {size}"


def _agree(found: Result, other: Result, dtype: str) -> bool:
    pairs = (found.loss, other.loss), (found.norm, other.norm)
    return found.tokens == other.tokens and all(abs(one - two) <= AGREEMENT[dtype] * abs(two) for one, two in pairs)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: real tokens a second, and peak memory."""
    lines = [
        "Real tokens a second: median (slowest–fastest round). MB: state, and the peak of a step above it. times: the",
        "side's rate over that of the peer's fastest setting at our precision; encoded: the same with the tokens that",
        "each side encodes, texts that come twice counted once for ours; memory: all of the side's over that peer's.",
        "",
        "| texts | batch | real tokens (distinct) | side | tokens/s | MB | times | encoded | memory | loss "
        "| gradient norm |",
        "|---|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        peer = row["measured"][row["best_peer"]]
        for name, value in row["measured"].items():
            one = Measured(**{field.name: value[field.name] for field in fields(Measured)})
            times = peer["seconds"] / one.seconds
            encoded = times * row["distinct_tokens"] / row["tokens"] if name.startswith("ours") else times
            ratios = [f"{ratio:.2f}" if row["agree"] else "no agreement" for ratio in (times, encoded)]
            result = row["results"][name]
            lines.append(
                f"| {row['texts']} | {row['batch']} | {row['tokens']} ({row['distinct_tokens']}) | {name} "
                f"| {rate_of(row['tokens'], one)} | {value['state_megabytes']:.0f} + {one.megabytes:.0f} "
                f"| {' | '.join(ratios)} | {_all_megabytes(value) / _all_megabytes(peer):.2f} "
                f"| {result['loss']:.4f} | {result['norm']:.4f} |"
            )
    lines += ["", *sorted({f"{row['date']}, {row['processor']}: `{row['command']}`." for row in rows})]
    return "\n".join(lines)


def _all_megabytes(value: dict[str, Any]) -> float:
    return float(value["state_megabytes"] + value["megabytes"])


def main() -> None:
    parser = arguments(__doc__, data="xquad-en/ and cisi/", model=True, dtype=True)
    parser.add_argument("--sets", nargs="*", choices=["questions", "abstracts"], default=["questions", "abstracts"])
    parser.add_argument("--batches", type=int, nargs="*", default=[256, 1024])
    parser.add_argument("--budgets", type=float, nargs="*", default=[0.0, 4.0], help="GiB of kept graphs")
    parser.add_argument("--chunk-tokens", type=int, default=2048)
    parser.add_argument("--dtypes", nargs="*", choices=DTYPES, help="of the peer, timed; default: ours and float32")
    parser.add_argument("--add", action="store_true", help="keep the results file's rows of other texts or batches")
    options = parser.parse_args()
    use(options)
    options.dtypes = options.dtypes or list(dict.fromkeys([options.dtype, "float32"]))
    if options.dtype not in options.dtypes:
        parser.error(f"--dtypes: expected {options.dtype} among them, which the table compares with")
    name, facts = f"step-{options.device}-{options.dtype}", circumstances(options.device)
    rows = earlier_rows(name) if options.add else []
    for batch in options.batches:
        for choice in options.sets:
            texts = questions(options.data, batch) if choice == "questions" else abstracts(options.data, batch)
            row = {
                "date": facts["date"],
                "command": facts["command"],
                "processor": facts["machine"]["processor"],
                **measure(texts, options),
            }
            rows = [one for one in rows if (one["texts"], one["batch"]) != (row["texts"], row["batch"])] + [row]
            path = write_results(name, facts, rows, table(rows))
    print(table(rows), path, sep="\n")


if __name__ == "__main__":
    main()
