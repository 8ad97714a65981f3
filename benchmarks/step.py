"""A whole training step: ours against sentence-transformers, on the same checkpoint and the same texts.

python benchmarks/step.py --data DIR [--model runs/quickstart/export] [--sets questions abstracts]
    [--batches 256 1024] [--budgets 0 4] [--dtype auto] [--dtypes bfloat16 float32] [--rounds 5] [--add]

A step is everything from texts to updated weights: tokens, embeddings, the loss over all Matryoshka dims,
gradients, clipping, AdamW. The learning rate is 0, so every round does the same work. Peers:
CachedMultipleNegativesRankingLoss under MatryoshkaLoss, in float32 and under bfloat16 autocast, at the
mini-batches of PEERS, of which one round over TRIED texts finds the fastest for each precision. Ours: with a budget of
so many GiB for kept graphs; with 0 every chunk is encoded twice, as the peer does. Tokens are those of the texts,
padding not counted. Ours encodes a text once that a batch holds twice; the table counts both ways. Memory is the peak
of two steps with weights and optimiser, in a process of the side's own: what another side leaves of the heap, in holes,
would count otherwise.
--dtype: ours, and the peer's that it is held against; part of the results file's name. --dtypes: all of the peer's that
are timed. In float32 both sides are compared once in any case, over EXACT queries at most.
--add: rows of the results file with other texts or batches stay.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
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
    begin,
    circumstances,
    earlier_rows,
    in_turns,
    peak_megabytes,
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
EXACT = 256
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
    few, exact = texts.first(TRIED), texts.first(EXACT)
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
        "ours float32": ours(options.model, "float32", options.chunk_tokens, 0.0)(exact),
        "peer float32": theirs(options.model, "float32", PEERS[-1])(exact),
    }
    megabytes = {name: _alone(make, texts, options.device) for name, make in makes.items()}
    sides = {name: make() for name, make in makes.items()}
    results |= {name: step(texts) for name, step in sides.items()}  # the round that does not count
    steps = {name: partial(step, texts) for name, step in sides.items()}
    measured = in_turns(steps, options.rounds, options.device, warm_up=0)
    return {
        "texts": texts.name,
        "batch": len(texts.queries),
        "tokens": results[next(iter(own))].tokens,
        "distinct_tokens": results[next(iter(own))].encoded,
        "tried": {name: as_row(value) for name, value in tried.items()},
        "measured": {name: as_row(value) | {"megabytes": megabytes[name]} for name, value in measured.items()},
        "results": {name: asdict(one) for name, one in results.items()},
        "agree": _agree(results["ours float32"], results["peer float32"], "float32")
        and all(_agree(results[name], results[best[options.dtype]], options.dtype) for name in own),
        "best_peer": best[options.dtype],
    }


def _tried(make: Callable[[], Step], texts: Texts, device: str) -> Measured:
    step = make()
    return in_turns({"one": partial(step, texts)}, 1, device)["one"]


def _alone(make: Callable[[], Step], texts: Texts, device: str) -> float:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_megabytes, make, texts, device).result()


def _peak_megabytes(make: Callable[[], Step], texts: Texts, device: str) -> float:
    make()(texts.first(1))  # what a first step takes once in a process: imports and the like
    before = begin(device)
    step = make()
    for _ in range(2):
        step(texts)
    return peak_megabytes(device) - before


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
        "Real tokens a second: median (slowest–fastest round). MB: peak of a process that does the side's steps alone.",
        "times: the side's rate over that of the peer's fastest setting at our precision; encoded: the same with the",
        "tokens that each side encodes, texts that come twice counted once for ours; memory: MB over that peer's.",
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
                f"| {rate_of(row['tokens'], one)} | {one.megabytes:.0f} | {' | '.join(ratios)} "
                f"| {one.megabytes / peer['megabytes']:.2f} "
                f"| {result['loss']:.4f} | {result['norm']:.4f} |"
            )
    lines += ["", *sorted({f"{row['date']}, {row['processor']}: `{row['command']}`." for row in rows})]
    return "\n".join(lines)


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
