"""A whole training step: ours against sentence-transformers, on the same checkpoint and the same texts.

python benchmarks/step.py --data DIR [--model runs/quickstart/export] [--batches 256 1024] [--rounds 5]

A step is everything from texts to updated weights: tokens, embeddings, the loss over all Matryoshka dims,
gradients, clipping, AdamW. The learning rate is 0, so every round does the same work. Peers:
CachedMultipleNegativesRankingLoss under MatryoshkaLoss, in float32 and under bfloat16 autocast, at the
mini-batches of PEERS, of which one round over TRIED texts finds the fastest for each precision. Tokens are those of the
texts, padding not counted, each text once. Without --budget no graph is kept, and every chunk is encoded twice.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import Measured, as_row, circumstances, in_turns, use_device, write_results
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss
from texts import Texts, abstracts, questions

from drama_dist import ranks
from drama_dist.encoder.backbone import load
from drama_dist.engine import Engine, OptimiserSettings
from drama_dist.settings import TrainSettings
from drama_dist.train.fused_layers import fuse_layers
from drama_dist.train.grad_cache import GradCache
from drama_dist.train.objective import contrastive_objective

TEMPERATURE = 0.05
CLIPPING = 1.0
DTYPES = ("bfloat16", "float32")
TRIED = 64
LIMIT = 512  # tokens of a text
PEERS = (
    {"mini_batch_size": 32},
    {"mini_batch_size": 8},
    {"mini_batch_size": 128, "mini_batch_num_tokens": 1024},
    {"mini_batch_size": 128, "mini_batch_num_tokens": 4096},
)
AGREEMENT = {"float32": 1e-3, "bfloat16": 0.1}  # of the loss and of the gradient's norm, relative
Step = Callable[[Texts], tuple[float, float, int]]  # loss, gradient's norm, real tokens


def ours(model: Path, dtype: str, chunk_tokens: int, budget: float) -> Step:
    """The training loop's own parts; budget: bytes for kept graphs."""
    encoder = load(model)
    fuse_layers(encoder.backbone)
    encoder.contract = replace(encoder.contract, max_query_tokens=LIMIT, max_passage_tokens=LIMIT)
    engine = Engine(encoder, OptimiserSettings(dtype, 1, 0.01, CLIPPING))
    cache = GradCache(encoder, engine, chunk_tokens, budget)
    train = TrainSettings(temperature=TEMPERATURE)

    def step(texts: Texts) -> tuple[float, float, int]:
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
        return objective.loss, engine.step(0.0), sum(map(len, sequences))

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

    def step(texts: Texts) -> tuple[float, float, int]:
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
        return float(value.detach()), float(norm), tokens

    return step


def measure(texts: Texts, options: argparse.Namespace) -> dict[str, Any]:
    """One line of the table."""
    names = {dtype: [_name(dtype, peer) for peer in PEERS] for dtype in DTYPES}
    peers = {_name(dtype, peer): theirs(options.model, dtype, peer) for dtype in DTYPES for peer in PEERS}
    few = texts.first(TRIED)
    tried = in_turns({name: partial(step, few) for name, step in peers.items()}, 1, options.device)
    best = {dtype: min(names[dtype], key=lambda name: tried[name].seconds) for dtype in names}
    sides = {
        "ours bfloat16": ours(options.model, "bfloat16", options.chunk_tokens, options.budget * 2**30),
        best["bfloat16"]: peers[best["bfloat16"]],
        best["float32"]: peers[best["float32"]],
    }
    del peers
    results = {name: step(texts) for name, step in sides.items()}
    exact = ours(options.model, "float32", options.chunk_tokens, 0.0)(texts)
    measured = in_turns({name: partial(step, texts) for name, step in sides.items()}, options.rounds, options.device)
    return {
        "texts": texts.name,
        "batch": len(texts.queries),
        "tokens": exact[2],
        "tried": {name: as_row(value) for name, value in tried.items()},
        "measured": {name: as_row(value) for name, value in measured.items()},
        "results": {"ours float32": exact, **results},
        "agree": _agree(exact, results[best["float32"]], "float32")
        and _agree(results["ours bfloat16"], results[best["bfloat16"]], "bfloat16"),
    }


def _name(dtype: str, peer: dict[str, int]) -> str:
    size = f"{peer['mini_batch_num_tokens']} tokens" if "mini_batch_num_tokens" in peer else peer["mini_batch_size"]
    return f"peer {dtype}, mini-batch {size}"


def _agree(found: tuple[float, float, int], other: tuple[float, float, int], dtype: str) -> bool:
    close = all(abs(own - its) <= AGREEMENT[dtype] * abs(its) for own, its in zip(found[:2], other[:2], strict=True))
    return close and found[2] == other[2]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: real tokens a second, and extra peak memory."""
    lines = [
        "Real tokens a second (median; slowest to fastest round), extra peak memory of a step, loss and gradient norm.",
        "times: ours over the side; memory: ours over the side.",
        "",
        "| texts | batch | real tokens | side | tokens/s | MB | times | memory | loss | gradient norm |",
        "|---|--:|--:|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        own = Measured(**row["measured"]["ours bfloat16"])
        for name, value in row["measured"].items():
            one = Measured(**value)
            loss, norm, _ = row["results"][name]
            rates = [row["tokens"] / seconds for seconds in (one.seconds, one.slowest, one.fastest)]
            times = f"{one.seconds / own.seconds:.2f}" if row["agree"] else "no agreement"
            lines.append(
                f"| {row['texts']} | {row['batch']} | {row['tokens']} | {name} | {rates[0]:.0f} "
                f"({rates[1]:.0f}–{rates[2]:.0f}) | {one.megabytes:.0f} | {times} "
                f"| {own.megabytes / one.megabytes:.2f} | {loss:.4f} | {norm:.4f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder with xquad-en/ and cisi/ in BEIR form")
    parser.add_argument("--model", type=Path, default=Path("runs/quickstart/export"), help="an exported folder")
    parser.add_argument("--sets", nargs="*", choices=["questions", "abstracts"], default=["questions", "abstracts"])
    parser.add_argument("--batches", type=int, nargs="*", default=[256, 1024])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunk-tokens", type=int, default=2048)
    parser.add_argument("--budget", type=float, default=0.0, help="GiB of kept graphs")
    options = parser.parse_args()
    use_device(options.device)
    facts, rows = circumstances(options.device), []
    for batch in options.batches:
        for name in options.sets:
            texts = questions(options.data, batch) if name == "questions" else abstracts(options.data, batch)
            rows.append(measure(texts, options))
            path = write_results(f"step-{options.device}", facts, rows, table(rows))
    print(table(rows), path, sep="\n")


if __name__ == "__main__":
    main()
